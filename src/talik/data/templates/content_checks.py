"""Checks that a chat template writes all of a row: text that it drops is text that nobody learns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from talik.data.messages import Message
from talik.data.reading.rows import RowError

NOT_WRITTEN = "not written by the chat template"
_SWITCH = re.compile(r"/(?:no_)?think\b")  # in a text: read and taken out by some templates
_THOUGHT = re.compile(r"\A\s*(?:<think>)?(.*?)</think>", re.DOTALL)


def thought_of(message: Message) -> str:
    """The reasoning of an answer, from its own field or from the tags in its text."""
    if message.reasoning:
        return message.reasoning.strip()
    found = _THOUGHT.match(message.content)
    return found[1].strip() if found else ""


def said_of(message: Message) -> str:
    """The text of a message without the reasoning of an answer."""
    if message.role != "assistant" or message.reasoning:
        return message.content if message.role == "assistant" else _SWITCH.sub("", message.content)
    return _THOUGHT.sub("", message.content)


def check_answer(message: Message, number: int, written: str) -> None:
    """Checks that an answer's text, reasoning and calls stand in what the model is to write.

    Raises:
        RowError: One of them does not.
    """
    if not is_in(said_of(message), written):
        raise not_found(number)
    if (thought := thought_of(message)) and not is_in(thought, written):
        problem = f"the chat template does not write the reasoning of message {number}"
        raise RowError(NOT_WRITTEN, problem, "reasoning")
    for call in message.tool_calls:
        if not is_in(call.name, written) or not all(is_in(leaf, written) for leaf in _leaves(call.arguments)):
            problem = f"the chat template does not write the call of {call.name!r} in message {number}"
            raise RowError(NOT_WRITTEN, problem, "tool_calls")


def not_found(number: int) -> RowError:
    """The error for an answer that stands nowhere in the template's text."""
    problem = f"the answer in message {number} cannot be found in what the chat template writes"
    return RowError("answer not found", problem)


def check_written(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str) -> None:
    """Checks that the messages and the tools stand in an example's text.

    Raises:
        RowError: The template has left one out.
    """
    for number, message in enumerate(messages, start=1):
        if not is_in(said_of(message), text):
            problem = f"the chat template does not write message {number} ({message.role})"
            raise RowError(NOT_WRITTEN, problem, "content")
        for call in message.tool_calls:
            if call.name not in text:
                problem = f"the chat template does not write the call of {call.name!r} in message {number}"
                raise RowError(NOT_WRITTEN, problem, "tool_calls")
    for tool in tools:
        name = str(tool.get("function", tool).get("name", ""))
        if name not in text:
            raise RowError(NOT_WRITTEN, f"the chat template does not write the tool {name!r}", "tools")


def is_in(part: str, text: str) -> bool:
    """Whether a text holds a part: as it is, without blanks around it or between, or as JSON writes it."""
    part = part.strip()
    if part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
        return True
    return "".join(part.split()) in "".join(text.split())


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a JSON value."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
