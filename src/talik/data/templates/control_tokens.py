"""Control tokens in the text of a row: refused, quoted as ordinary text, or kept as control tokens.

Only the chat template may write them: in a text they would end a turn or begin one. Data that talk about
templates quote them: then they are encoded letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from talik.data.messages import Conversation, Document, Message, ToolCall
from talik.data.reading.rows import RowError
from talik.data.templates.template import Template, any_of
from talik.data.templates.template_facts import Facts
from talik.data.templates.turns import Answer, Rendered

_OPEN, _CLOSE = "\uf8fe", "\uf8ff"  # private use: around a quoted token while the template renders it
_MARKED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)
_OF_REASONING = re.compile(r"</?(think\w*|thought|reasoning)>|\[/?THINK\]")
CONTROL_TOKEN = "control token"


def control_tokens(template: Template, facts: Facts) -> re.Pattern[str]:
    """Matches the template's own tokens: special ones, ends of turns, those of the generation prompt."""
    asked = set(template.token.findall(facts.generation_prompt))
    own = template.special | (set(facts.ends) & template.added) | asked
    return re.compile(any_of({token for token in own if token and not _OF_REASONING.fullmatch(token)}))


def check_control_tokens(row: Conversation | Document, control: re.Pattern[str]) -> None:
    """RowError for the first control token in a text of the row."""
    for name, text in texts_of(row):
        if found := control.search(text):
            problem = f"{name} holds the control token {found[0]!r} at character {found.start() + 1:,}"
            raise RowError(CONTROL_TOKEN, problem, name)


def texts_of(row: Conversation | Document) -> Iterator[tuple[str, str]]:
    """Every text of a row, with its name in words."""
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
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings([key, inner])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def quote(conversation: Conversation, control: re.Pattern[str]) -> Conversation:
    """The conversation with marks around every control token in its texts."""
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
    if isinstance(value, Mapping):
        return {key: _marked(inner, control) for key, inner in value.items()}
    return [_marked(inner, control) for inner in value] if isinstance(value, list | tuple) else value


def unquoted(rendered: Rendered) -> tuple[Rendered, list[tuple[int, int]]]:
    """An example without the marks, and the ranges of its quoted control tokens.

    Raises:
        RowError: The template has taken a quoted token apart.
    """
    if _OPEN not in rendered.text and _CLOSE not in rendered.text:
        return rendered, []
    marks = [(found.start(), found.end()) for found in _MARKED.finditer(rendered.text)]
    text = _MARKED.sub("\\1", rendered.text)
    if _OPEN in text or _CLOSE in text:
        raise RowError(CONTROL_TOKEN, "the chat template takes a quoted control token apart")

    def moved(at: int) -> int:
        return at - sum((at > start) + (at >= stop) for start, stop in marks)

    answers = tuple(
        Answer(*map(moved, (a.start, a.content_stop, a.stop, a.reasoning_stop))) for a in rendered.answers
    )
    ranges = [(moved(start), moved(stop)) for start, stop in marks]
    return replace(rendered, text=text, answers=answers, new=moved(rendered.new)), ranges
