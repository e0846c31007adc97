"""Checks the order of the turns in a conversation.

A conversation may start with one system (or developer) message. Then user messages and assistant answers
alternate. An answer that calls tools is followed by one or several tool results, and then by another answer.
The last message is an answer, and no answer is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from talik.data.formats.tools import NO_TOOL
from talik.data.messages import Message
from talik.data.reading.rows import RowError

# Each role -> the roles that may follow; None is the start of the conversation.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def check_turns(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Returns the messages if their order is valid.

    Raises:
        RowError: A message is out of order, or calls a tool that is not defined.
    """
    if not any(message.role == "assistant" for message in messages):
        problem = "the conversation has no assistant message, so there is nothing to train"
        raise RowError("no answer", problem, "messages")
    before: Message | None = None
    known = {str(tool.get("function", tool).get("name")) for tool in tools}
    for number, message in enumerate(messages, start=1):
        _check_next(before, message, number)
        unknown = next((call.name for call in message.tool_calls if known and call.name not in known), None)
        if unknown is not None:
            problem = f"message {number} calls the tool {unknown!r}, which is not among the row's tools"
            raise RowError(NO_TOOL, problem, f"messages[{number - 1}].tool_calls")
        before = message
    if messages[-1].role != "assistant":
        problem = f"the last message is a {messages[-1].role} message; it must be an assistant message"
        raise RowError(f"ends with the {messages[-1].role}", problem, f"messages[{len(messages) - 1}]")
    return tuple(messages)


def _check_next(before: Message | None, message: Message, number: int) -> None:
    field = f"messages[{number - 1}]"
    role = message.role
    if role in ("system", "developer") and before is not None:
        problem = f"message {number} is a {role} message; only the first message may be one"
        raise RowError("system message not first", problem, field)
    if before is None and role not in FOLLOWS[None]:
        article = "an" if role == "assistant" else "a"
        problem = f"the conversation starts with {article} {role} message; it must start with a user message"
        raise RowError(f"starts with the {role}", problem, field)
    if role == "tool" and before is not None and before.role not in ("assistant", "tool"):
        problem = f"message {number} is a tool result without a call before it"
        raise RowError("tool result without a call", problem, field)
    if before is not None and before.role == role and role != "tool":
        problem = f"messages {number - 1} and {number} are both {role} messages"
        raise RowError("two turns of one role", problem, field)
    if before is not None and role not in FOLLOWS[before.role]:
        problem = f"message {number} has the role {role} and cannot follow the role {before.role}"
        raise RowError("wrong order of turns", problem, field)
