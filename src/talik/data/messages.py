"""The result of converting a row: a conversation or a document.

Formats create them, templates and labels turn them into tokens; nothing after the formats depends on the
format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from talik.data.reading.rows import Place

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call by the assistant; `arguments` is a JSON value, usually an object, not its text."""

    name: str
    arguments: Any
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: One of ROLES.
        content: Its text; "" only where an assistant only calls tools.
        reasoning: What the assistant thinks before it answers; "" if it does not.
        tool_calls: The calls that the assistant makes in this turn, after `content`.
        name: The tool whose result this is, or the name of who speaks.
        call_id: The id of the call whose result this is.
        trained: False: context, whatever `train_on` says of assistant turns (`weight: 0`, a TRL prompt).
            None: as `train_on` says.
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    call_id: str | None = None
    trained: bool | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one row: a system message at most first, an assistant message last.

    `tools` are the definitions that the template is given, each {"type": "function", "function": {...}}.
    """

    messages: tuple[Message, ...]
    place: Place
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text without turns; every token is trained."""

    text: str
    place: Place
