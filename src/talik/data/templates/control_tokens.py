"""Handles control tokens in the text of a row: refuses them, or encodes them as ordinary text.

Only the chat template may write control tokens: in a text they would end or begin a turn. Data about
templates quote them; they are then encoded as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from talik.data.messages import Conversation, Document, Message, ToolCall
from talik.data.reading.rows import RowError, is_list, is_object
from talik.data.templates.template import Template, any_of
from talik.data.templates.template_facts import TemplateFacts
from talik.data.templates.turns import Answer, Rendered

_OPEN, _CLOSE = "\uf8fe", "\uf8ff"  # private use: around a quoted token while the template renders it
_MARKED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)
_REASONING_TAG = re.compile(r"</?(think\w*|thought|reasoning)>|\[/?THINK\]")
CONTROL_TOKEN = "control token"


def control_tokens(template: Template, facts: TemplateFacts) -> re.Pattern[str]:
    """Returns the pattern of the control tokens.

    They are the special tokens, the ends of turns, and the tokens of the generation prompt, without tags of
    reasoning.
    """
    asked = set(template.token.findall(facts.generation_prompt))
    own = template.special | (set(facts.ends) & template.added) | asked
    return re.compile(any_of({token for token in own if token and not _REASONING_TAG.fullmatch(token)}))


def check_control_tokens(row: Conversation | Document, control: re.Pattern[str]) -> None:
    """Checks that no text of a row contains a control token.

    Raises:
        RowError: A text does; the error names the first one.
    """
    for name, text in texts_of(row):
        if found := control.search(text):
            problem = f"{name} contains the control token {found[0]!r} at character {found.start() + 1:,}"
            raise RowError(CONTROL_TOKEN, problem, name)


def texts_of(row: Conversation | Document) -> Iterator[tuple[str, str]]:
    """Yields every text of a row with a name for messages."""
    if isinstance(row, Document):
        yield "the text", row.text
        return
    for number, message in enumerate(row.messages, start=1):
        name = f"message {number} ({message.role})"
        yield name, message.content
        if message.reasoning:
            yield f"the reasoning of {name}", message.reasoning
        for call in message.tool_calls:
            yield from ((f"a tool call of {name}", text) for text in _strings([call.name, call.arguments]))
    yield from (("a tool", text) for text in _strings(list(row.tools)))


def _strings(value: Any) -> Iterator[str]:
    """Yields the strings in a JSON value, including keys."""
    if isinstance(value, str):
        yield value
    elif is_object(value):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif is_list(value):
        for inner in value:
            yield from _strings(inner)


def quote(conversation: Conversation, control: re.Pattern[str]) -> Conversation:
    """Returns the conversation with private-use characters around every control token in its texts."""
    if not any(control.search(text) for _, text in texts_of(conversation)):
        return conversation
    messages = tuple(_quoted(message, control) for message in conversation.messages)
    return replace(conversation, messages=messages, tools=tuple(_marked(list(conversation.tools), control)))


def _quoted(message: Message, control: re.Pattern[str]) -> Message:
    calls = (ToolCall(c.name, _marked(c.arguments, control), c.id) for c in message.tool_calls)
    return replace(
        message,
        content=_marked(message.content, control),
        reasoning=_marked(message.reasoning, control),
        tool_calls=tuple(calls),
    )


def _marked(value: Any, control: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return control.sub(f"{_OPEN}\\g<0>{_CLOSE}", value.replace(_OPEN, "").replace(_CLOSE, ""))
    if is_object(value):
        return {key: _marked(inner, control) for key, inner in value.items()}
    return [_marked(inner, control) for inner in value] if is_list(value) else value


def unquoted(rendered: Rendered) -> tuple[Rendered, list[tuple[int, int]]]:
    """Removes the marks of `quote` from a rendered example.

    Returns:
        The example without marks, and the ranges of the quoted control tokens in its text.

    Raises:
        RowError: The template has split a quoted token.
    """
    if _OPEN not in rendered.text and _CLOSE not in rendered.text:
        return rendered, []
    marks = [(found.start(), found.end()) for found in _MARKED.finditer(rendered.text)]
    text = _MARKED.sub("\\1", rendered.text)
    if _OPEN in text or _CLOSE in text:
        raise RowError(CONTROL_TOKEN, "the chat template splits a quoted control token")

    def moved(at: int) -> int:
        return at - sum((at > start) + (at >= stop) for start, stop in marks)

    answers = tuple(
        Answer(*map(moved, (a.start, a.content_stop, a.stop, a.reasoning_stop))) for a in rendered.answers
    )
    ranges = [(moved(start), moved(stop)) for start, stop in marks]
    return replace(rendered, text=text, answers=answers, new=moved(rendered.new)), ranges
