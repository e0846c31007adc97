"""Renders a conversation to the texts of its examples, with the ranges of the trained answers.

Each trained turn is rendered twice: its prompt, as at inference, and the conversation up to and including the
answer. The model learns the text after the prompt, up to and including the end of the turn. Turns share an
example as long as each later prompt starts with the text before it. If a template writes an earlier answer
differently (for example without its reasoning), the next turn starts a new example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from talik.data.messages import Conversation, Message
from talik.data.reading.rows import RowError
from talik.data.templates.answers import aligned, end_in, reasoning_stop, with_thought
from talik.data.templates.content_checks import NOT_WRITTEN, check_answer, check_written
from talik.data.templates.generation_marks import has_marks, marked_answer
from talik.data.templates.template import Chat, Template
from talik.data.templates.template_facts import TemplateFacts, common_prefix

TEMPLATE_REFUSES = "refused by the chat template"
NOTHING_TO_TRAIN = "nothing to train"
NO_END = "no end token"


@dataclass(frozen=True, slots=True)
class Answer:
    """The range of characters of an answer in the text of an example.

    Attributes:
        start: The first character.
        content_stop: The end of the content; the end of turn follows.
        stop: The end of the end of turn.
        reasoning_stop: The end of the reasoning; `start` if there is none.
    """

    start: int
    content_stop: int
    stop: int
    reasoning_stop: int


@dataclass(slots=True)
class Rendered:
    """The text of one example with its trained answers.

    Attributes:
        text: The whole text.
        answers: The trained answers, in order.
        new: The length of the prefix that is the same as in the conversation's previous example.
        added_ends: The number of answers whose end the template does not write, so that it was added.
        thoughts: The number of answers whose reasoning the template drops, or whose empty thought was closed.
    """

    text: str
    answers: tuple[Answer, ...]
    new: int = 0
    added_ends: int = 0
    thoughts: int = 0


@dataclass(frozen=True, slots=True)
class _Turn:
    """A trained turn.

    Attributes:
        index: The index of the answer among the messages.
        prompt: The rendered prompt.
        written: The text that the model learns, up to and including the end of the turn.
        tail: The text that the template writes after that.
        start: The start of the answer in `written`; negative if the marks of the template begin in the
            prompt.
        content_stop: The end of the content in `written`.
        reasoning_stop: The end of the reasoning in `written`.
        added_end: True if the template writes no end of turn, so that the tokenizer's was added.
        thought: True if the reasoning was added or an empty thought was closed.
    """

    index: int
    prompt: str
    written: str
    tail: str
    start: int
    content_stop: int
    reasoning_stop: int
    added_end: bool
    thought: bool


def render(
    conversation: Conversation, template: Template, facts: TemplateFacts, train_on: str
) -> list[Rendered]:
    """Renders the examples of a conversation.

    There are several examples if the template writes earlier answers differently.

    Args:
        conversation: The conversation.
        template: The template.
        facts: The facts about the template.
        train_on: "assistant": all answers that are not context. "last": the last of them. "all": the whole
            text.

    Raises:
        RowError: The template refuses the messages or drops a part of them, or an answer cannot be found in
            its text.
    """
    messages = known_roles(conversation.messages, facts)
    trained = _trained(messages, train_on)
    if not trained:
        raise RowError(NOTHING_TO_TRAIN, "no assistant message is to be trained")
    if not facts.ends and not facts.added_end:
        problem = "the chat template writes no end of turn, and the tokenizer has no end token (eos_token)"
        raise RowError(NO_END, problem)
    if conversation.tools and not facts.tools:
        raise RowError(NOT_WRITTEN, "the chat template does not write tool definitions", "tools")
    chat = template.chat(messages)
    made: list[Rendered] = []
    last: _Turn | None = None
    for turn in _turns(messages, chat, trained, conversation.tools, template, facts):
        if last is None or not turn.prompt.startswith(made[-1].text):
            _end_example(made, last, messages, conversation.tools)
            made.append(_begun(turn, made[-1].text if made else ""))
        else:
            _extend(made[-1], turn)
        last = turn
    _end_example(made, last, messages, conversation.tools)
    return made


def known_roles(messages: Sequence[Message], facts: TemplateFacts) -> Sequence[Message]:
    """Returns the messages with the role "system" for a developer message that the template does not know."""
    if messages[0].role == "developer" and not facts.developer:
        return [replace(messages[0], role="system"), *messages[1:]]
    return messages


def _trained(messages: Sequence[Message], train_on: str) -> list[int]:
    """Returns the indices of the answers to train."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if train_on != "all":
        answers = [i for i in answers if messages[i].trained is not False]
    return answers[-1:] if train_on == "last" else answers


def _begun(turn: _Turn, before: str) -> Rendered:
    """Starts an example with a turn; `before` is the text of the previous example."""
    rendered = Rendered(turn.prompt, (), common_prefix(before, turn.prompt))
    _extend(rendered, turn)
    return rendered


def _extend(rendered: Rendered, turn: _Turn) -> None:
    """Adds a turn whose prompt starts with the text so far."""
    at = len(turn.prompt)
    rendered.text = turn.prompt + turn.written
    answer = Answer(
        at + turn.start, at + turn.content_stop, len(rendered.text), at + max(turn.start, turn.reasoning_stop)
    )
    rendered.answers += (answer,)
    rendered.added_ends += turn.added_end
    rendered.thoughts += turn.thought


def _end_example(
    made: list[Rendered], last: _Turn | None, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> None:
    """Adds the text after the last answer, and checks that the example contains all of its messages."""
    if last is not None:
        made[-1].text += last.tail
        check_written(messages[: last.index + 1], tools, made[-1].text)


def _turns(
    messages: Sequence[Message],
    chat: Chat,
    trained: Sequence[int],
    tools: Sequence[Mapping[str, Any]],
    template: Template,
    facts: TemplateFacts,
) -> Iterator[_Turn]:
    """Yields each trained turn, rendered on demand, so that the prompts are not all in memory."""
    for index in trained:
        prompt = _accepted(template.apply(chat[:index], tools, prompt=True))
        yield _turn(messages[index], index, chat, tools, template, facts, prompt)


def _accepted(text: str | Exception) -> str:
    """Returns the rendered text; RowError if the template refused the messages."""
    if isinstance(text, Exception):
        problem = f"the chat template refuses these messages: {text or type(text).__name__}"
        raise RowError(TEMPLATE_REFUSES, problem)
    return text


def _turn(
    message: Message,
    index: int,
    chat: Chat,
    tools: Sequence[Mapping[str, Any]],
    template: Template,
    facts: TemplateFacts,
    prompt: str,
) -> _Turn:
    """Renders one trained turn whose prompt is given."""
    whole = _accepted(template.apply(chat[: index + 1], tools))
    plain = whole[len(prompt) :] if whole.startswith(prompt) else None
    if plain is None:
        plain = aligned(chat, index, tools, template, facts, prompt, whole)
    written = with_thought(message, prompt, plain, template)
    check_answer(message, index + 1, written)
    content_stop, stop = end_in(written, template, facts)
    added = stop is None
    if stop is None:
        written += facts.added_call_end if message.tool_calls else facts.added_end
        stop = len(written)
    start = 0
    if has_marks(template, tools) and whole.startswith(prompt):
        begin, end = marked_answer(chat[: index + 1], tools, template, prompt, written[:stop])
        start, stop = begin - len(prompt), end - len(prompt)
    return _Turn(
        index,
        prompt,
        written[:stop],
        written[stop:],
        start,
        content_stop,
        reasoning_stop(message, written[:content_stop]),
        added and facts.end_from == "tokenizer",
        written[: len(plain)] != plain,
    )
