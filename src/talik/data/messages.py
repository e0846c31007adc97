"""Conversations and documents: the common form of the rows of all formats.

`formats` converts rows to them, and `templates` and `labels` convert them to tokens, independently of the
format of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from talik.data.reading.rows import Place

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of the assistant. `arguments` is a JSON value, usually an object, never JSON text."""

    name: str
    arguments: Any
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: One of ROLES.
        content: The text; "" only if the assistant only calls tools.
        reasoning: The reasoning of the assistant before its answer; "" if there is none.
        tool_calls: The tool calls of the assistant in this turn, after `content`.
        name: The name of the tool whose result this is, or of the speaker.
        call_id: The id of the tool call whose result this is.
        trained: False: the message is context for any `train_on` (`weight: 0`, a prompt of TRL).
            None: `train_on` decides.
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
    """The messages of one row. The last one is an assistant message; the first one may be a system message.

    `tools` are the tool definitions for the template, each {"type": "function", "function": {...}}.
    """

    messages: tuple[Message, ...]
    place: Place
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text without turns; all its tokens are trained."""

    text: str
    place: Place
