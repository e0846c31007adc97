"""A conversation -> the texts of its examples, with the characters of every answer that is trained.

For each trained turn the template is asked twice: for the prompt, as at inference, and for the conversation
up to the answer. The model learns to write all that follows the prompt, up to and including the end of the
turn. Turns share an example as long as each later prompt begins with the text before it; where a template
writes an earlier answer in another way (without its reasoning, say), the next turn begins an example of its
own.
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
from talik.data.templates.template_facts import Facts, common_prefix

TEMPLATE_REFUSES = "refused by the chat template"
NOTHING_TO_TRAIN = "nothing to train"
NO_END = "no end token"


@dataclass(frozen=True, slots=True)
class Answer:
    """The characters `start:stop` of an answer; from `content_stop` on they are its end of turn.

    `reasoning_stop`: up to there the answer is reasoning; `start` where it has none.
    """

    start: int
    content_stop: int
    stop: int
    reasoning_stop: int


@dataclass(slots=True)
class Rendered:
    """The text of one example, and what was decided for it.

    Attributes:
        text: All that the model reads.
        answers: The answers to train, in order.
        new: The characters before it stand in the conversation's example before this one.
        added_ends: Answers whose end the template does not write in this place.
        thoughts: Answers whose reasoning the template drops, or whose empty thought was closed.
    """

    text: str
    answers: tuple[Answer, ...]
    new: int = 0
    added_ends: int = 0
    thoughts: int = 0


@dataclass(frozen=True, slots=True)
class _Turn:
    """A trained turn: what is asked, what is answered, and what the template writes after that."""

    index: int
    prompt: str
    written: str
    tail: str
    start: int  # of the answer in `written`; -1 where marks of the template begin in the prompt
    content_stop: int
    reasoning_stop: int
    added_end: bool
    thought: bool


def render(conversation: Conversation, template: Template, facts: Facts, train_on: str) -> list[Rendered]:
    """The examples of a conversation: one, or several where the template demands it.

    Raises:
        RowError: The template refuses the messages or does not write a part of them, or an answer cannot be
            found in its text.
    """
    messages = known_roles(conversation.messages, facts)
    trained = _trained(messages, train_on)
    if not trained:
        raise RowError(NOTHING_TO_TRAIN, "no assistant message is to be trained")
    if not facts.ends and not facts.added_end:
        problem = "the chat template writes no end of turn and the tokenizer has no end token (eos_token)"
        raise RowError(NO_END, problem)
    if conversation.tools and not facts.tools:
        raise RowError(NOT_WRITTEN, "the chat template does not write the definitions of tools", "tools")
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


def known_roles(messages: Sequence[Message], facts: Facts) -> Sequence[Message]:
    """The messages with a role for the developer's that the template knows."""
    if messages[0].role == "developer" and not facts.developer:
        return [replace(messages[0], role="system"), *messages[1:]]
    return messages


def _trained(messages: Sequence[Message], train_on: str) -> list[int]:
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if train_on != "all":
        answers = [i for i in answers if messages[i].trained is not False]
    return answers[-1:] if train_on == "last" else answers


def _begun(turn: _Turn, before: str) -> Rendered:
    rendered = Rendered(turn.prompt, (), common_prefix(before, turn.prompt))
    _extend(rendered, turn)
    return rendered


def _extend(rendered: Rendered, turn: _Turn) -> None:
    """Adds a turn whose prompt begins with the text so far."""
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
    """Adds what the template writes after the last answer, and checks that nothing of the row is lost."""
    if last is not None:
        made[-1].text += last.tail
        check_written(messages[: last.index + 1], tools, made[-1].text)


def _turns(
    messages: Sequence[Message],
    chat: Chat,
    trained: Sequence[int],
    tools: Sequence[Mapping[str, Any]],
    template: Template,
    facts: Facts,
) -> Iterator[_Turn]:
    """Each trained turn, rendered when it is asked for: the prefixes are never held all at once."""
    for index in trained:
        prompt = _sound(template.apply(chat[:index], tools, prompt=True))
        yield _turn(messages[index], index, chat, tools, template, facts, prompt)


def _sound(text: str | Exception) -> str:
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
    facts: Facts,
    prompt: str,
) -> _Turn:
    """What the model is asked to write in one turn."""
    whole = _sound(template.apply(chat[: index + 1], tools))
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
