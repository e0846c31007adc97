"""The rule that the turns of a conversation keep.

A system (or developer) message at most first; then a user's message, an answer of the assistant, and so on in
turn. An answer that calls tools is followed by their results, one or several, and then by another answer. The
last message is the assistant's, and no answer is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from talik.data.formats.tools import NO_TOOL
from talik.data.messages import Message
from talik.data.reading.rows import RowError

# What may follow a role; None is the start.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def check_turns(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """The messages, if they keep the rule.

    Raises:
        RowError: They do not; the error says which message breaks it, and how.
    """
    if not any(message.role == "assistant" for message in messages):
        problem = "no message is the assistant's, so there is nothing to train"
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
        problem = f"the last message is the {messages[-1].role}'s; it must be the assistant's"
        raise RowError(f"ends with the {messages[-1].role}", problem, f"messages[{len(messages) - 1}]")
    return tuple(messages)


def _check_next(before: Message | None, message: Message, number: int) -> None:
    field = f"messages[{number - 1}]"
    role = message.role
    if role in ("system", "developer") and before is not None:
        problem = f"message {number} is a {role} message; one must come first, and only once"
        raise RowError("system message not first", problem, field)
    if before is None and role not in FOLLOWS[None]:
        problem = f"the conversation starts with the {role}; it must start with the user"
        raise RowError(f"starts with the {role}", problem, field)
    if role == "tool" and before is not None and before.role not in ("assistant", "tool"):
        problem = f"message {number} is the result of a tool, and no call comes before it"
        raise RowError("tool result without a call", problem, field)
    if before is not None and before.role == role and role != "tool":
        problem = f"messages {number - 1} and {number} are both the {role}'s"
        raise RowError("two turns of one role", problem, field)
    if before is not None and role not in FOLLOWS[before.role]:
        problem = f"message {number} is the {role}'s and follows the {before.role}'s"
        raise RowError("wrong order of turns", problem, field)
