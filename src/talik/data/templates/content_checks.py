"""Checks that a chat template writes all content of a row, because dropped text cannot be learnt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from talik.data.messages import Message
from talik.data.reading.rows import RowError, is_list, is_object

NOT_WRITTEN = "not written by the chat template"
_SWITCH = re.compile(r"/(?:no_)?think\b")  # switches in a text that some templates interpret and remove
_THOUGHT = re.compile(r"\A\s*(?:<think>)?(.*?)</think>", re.DOTALL)


def thought_of(message: Message) -> str:
    """Returns the reasoning of an answer, from its own field or from the tags in its text."""
    if message.reasoning:
        return message.reasoning.strip()
    found = _THOUGHT.match(message.content)
    return found[1].strip() if found else ""


def text_of(message: Message) -> str:
    """Returns the text of a message without reasoning and switches."""
    if message.role != "assistant" or message.reasoning:
        return message.content if message.role == "assistant" else _SWITCH.sub("", message.content)
    return _THOUGHT.sub("", message.content)


def check_answer(message: Message, number: int, written: str) -> None:
    """Checks that the text, reasoning and tool calls of an answer are in the text that the model learns.

    Args:
        message: The answer.
        number: The number of the message in the conversation, starting at 1.
        written: The text that the model learns to write.

    Raises:
        RowError: One of them is missing.
    """
    if not is_in(text_of(message), written):
        raise not_found(number)
    if (thought := thought_of(message)) and not is_in(thought, written):
        problem = f"the chat template does not write the reasoning of message {number}"
        raise RowError(NOT_WRITTEN, problem, "reasoning")
    for call in message.tool_calls:
        if not is_in(call.name, written) or not all(is_in(leaf, written) for leaf in _leaves(call.arguments)):
            problem = f"the chat template does not write the call of {call.name!r} in message {number}"
            raise RowError(NOT_WRITTEN, problem, "tool_calls")


def not_found(number: int) -> RowError:
    """Returns the error for an answer that is not in the rendered text."""
    problem = f"the answer in message {number} cannot be found in the text of the chat template"
    return RowError("answer not found", problem)


def check_written(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str) -> None:
    """Checks that the messages and the tools are in the text of an example.

    Raises:
        RowError: The template does not write one of them.
    """
    for number, message in enumerate(messages, start=1):
        if not is_in(text_of(message), text):
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
    """True if a text contains a part: as it is, as a JSON string, or when all blanks are ignored."""
    part = part.strip()
    if part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
        return True
    return "".join(part.split()) in "".join(text.split())


def _leaves(value: Any) -> Iterator[str]:
    """Yields the strings in a JSON value, without keys."""
    if is_object(value):
        for inner in value.values():
            yield from _leaves(inner)
    elif is_list(value):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
