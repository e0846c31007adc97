"""Reads lists of messages in the forms of OpenAI and ShareGPT, with content as text or as a list of parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from talik.data.formats.fields import MISSING, WRONG_TYPE, text
from talik.data.formats.media import PARTS, media_error
from talik.data.formats.tools import Tools, read_calls, read_tools
from talik.data.messages import Message, ToolCall
from talik.data.reading.rows import RowError, describe, is_list, is_object

ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("developer",), "developer"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "loss_weight", "train", "trainable", "loss")
_READ = {
    *("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", "id"),
    *(*REASONING, *WEIGHTS),
}
# Fields that other tools add to a message and that do not change its text.
_IGNORED = {
    *("timestamp", "date", "created_at", "model", "lang", "language", "index", "tokens", "metadata", "uuid"),
}


def read_messages(field: str, value: Any) -> tuple[list[Message], Tools]:
    """Reads a list of messages.

    Returns:
        The messages, and the tools that are defined in them.

    Raises:
        RowError: An item is not a message.
    """
    if not is_list(value) or not value:
        problem = f"field '{field}' must be a list of messages, it is {describe(value)}"
        raise RowError(WRONG_TYPE, problem, field)
    messages: list[Message] = []
    tools: Tools = ()
    for index, item in enumerate(value):
        read = _message(f"{field}[{index}]", item)
        message = read.message
        tools += read.tools
        if read.is_call and messages and messages[-1].role == "assistant":
            before = messages.pop()
            message = replace(before, tool_calls=before.tool_calls + message.tool_calls)
        messages.append(message)
    return messages, tools


@dataclass(frozen=True, slots=True)
class _Item:
    """An item of a list of messages.

    Attributes:
        message: The message.
        is_call: True for a ShareGPT turn with the role "function_call": its calls belong to the answer before
            it.
        tools: The tools that the message defines.
    """

    message: Message
    is_call: bool = False
    tools: Tools = ()


def _message(name: str, item: Any) -> _Item:
    keys = _keys(name, item)
    role = item[keys[0]]
    if not isinstance(role, str) or role.lower() not in ROLES:
        known = ", ".join(ROLES)
        problem = f"field '{name}.{keys[0]}' is {describe(role)}; known are {known}"
        raise RowError("unknown role", problem, f"{name}.{keys[0]}")
    known_role = ROLES[role.lower()]
    _check_fields(name, item)
    if known_role == "call":
        calls = read_calls(f"{name}.{keys[1]}", item[keys[1]])
        return _Item(Message("assistant", "", tool_calls=calls, trained=_trained(name, item)), is_call=True)
    content = _content(f"{name}.{keys[1]}", item.get(keys[1]), known_role)
    calls = content.calls + _calls(name, item)
    reasoning = "\n\n".join([*_reasoning(name, item), *content.reasoning])
    if known_role != "assistant" and (calls or reasoning):
        what = "tool calls" if calls else "reasoning"
        raise RowError("wrong role", f"field '{name}' is the {role}'s and has {what}", name)
    if not content.text.strip() and not calls and not (known_role == "system" or content.tools):
        text(f"{name}.{keys[1]}", item.get(keys[1]))
    call_id = item.get("tool_call_id") or (item.get("id") if known_role == "tool" else None)
    message = Message(
        known_role,
        content.text,
        reasoning,
        calls,
        _name(name, item),
        None if call_id is None else str(call_id),
        _trained(name, item) if known_role == "assistant" else None,
    )
    return _Item(message, tools=content.tools)


def _keys(name: str, item: Any) -> tuple[str, str]:
    """Returns the keys of a message's role and content."""
    if is_object(item):
        # In Parquet files every message has every key, with null for the absent ones.
        role, content = _present_key(item, "role", "from"), _present_key(item, "content", "value")
        if role and content is None and (item.get("tool_calls") or item.get("function_call")):
            content = "content"
        if role and content:
            return role, content
    wanted = "an object with 'role' and 'content', or 'from' and 'value'"
    raise RowError(MISSING, f"field '{name}' must be {wanted}, it is {describe(item)}", name)


def _present_key(item: Mapping[str, Any], *names: str) -> str | None:
    """Returns the first of these keys with a value, or else the first that exists."""
    present = [name for name in names if name in item]
    return next((name for name in present if item[name] is not None), present[0] if present else None)


def _check_fields(name: str, item: Mapping[str, Any]) -> None:
    """Refuses media, and fields that would be lost."""
    for key, value in item.items():
        if key in _READ or key in _IGNORED or value in (None, "", [], {}):
            continue
        kind = PARTS.get(key.lower(), PARTS.get(key.lower().rstrip("s")))
        if kind is not None:
            raise media_error(kind, f"{name}.{key}")
        problem = f"field '{name}.{key}' is not used, and its value is {describe(value)}"
        raise RowError("unknown field of a message", problem, f"{name}.{key}")


def _name(name: str, item: Mapping[str, Any]) -> str | None:
    return None if item.get("name") in (None, "") else text(f"{name}.name", item["name"])


def _reasoning(name: str, item: Mapping[str, Any]) -> list[str]:
    """Returns the reasoning of a message; the same text under several names counts once."""
    found = {text(f"{name}.{key}", item[key]): key for key in REASONING if item.get(key) not in (None, "")}
    if len(found) > 1:
        problem = f"field '{name}' has two different texts of reasoning: {' and '.join(found.values())}"
        raise RowError("two reasonings", problem, name)
    return list(found)


def _calls(name: str, item: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    keys = [key for key in ("tool_calls", "function_call") if item.get(key) not in (None, "", [], {})]
    return tuple(call for key in keys for call in read_calls(f"{name}.{key}", item[key]))


def _trained(name: str, item: Mapping[str, Any]) -> bool | None:
    """Returns False for a message that is marked as context; None if nothing is marked."""
    marks = {key: item[key] for key in WEIGHTS if item.get(key) is not None}
    wrong = next((key for key, mark in marks.items() if mark not in (0, 1)), None)
    if wrong is not None:
        problem = f"field '{name}.{wrong}' must be 0 or 1 (false or true), it is {describe(marks[wrong])}"
        raise RowError("wrong weight", problem, f"{name}.{wrong}")
    if len({bool(mark) for mark in marks.values()}) > 1:
        problem = f"field '{name}' has marks that contradict one another: {', '.join(marks)}"
        raise RowError("wrong weight", problem, name)
    return False if marks and not any(marks.values()) else None


@dataclass(frozen=True, slots=True)
class _Content:
    """The content of a message or of one of its parts."""

    text: str = ""
    reasoning: tuple[str, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    tools: Tools = ()


def _content(field: str, value: Any, role: str) -> _Content:
    """Reads the content of a message: text, null, a list of parts, or the JSON value of a tool result."""
    if value in (None, "", []):
        return _Content()
    if is_list(value) and all(isinstance(part, Mapping | str) for part in value):
        if role == "tool" and not any(is_object(part) and "type" in part for part in value):
            return _Content(json.dumps(value, ensure_ascii=False))
        return _joined(list(_parts(field, value)))
    if role == "tool" and (is_object(value) or is_list(value)):
        return _Content(json.dumps(value, ensure_ascii=False))
    if isinstance(value, str) and not value.strip() and role in ("assistant", "system"):
        return _Content()
    return _Content(text(field, value))


def _joined(parts: list[_Content]) -> _Content:
    return _Content(
        "".join(part.text for part in parts),
        tuple(thought for part in parts for thought in part.reasoning),
        tuple(call for part in parts for call in part.calls),
        tuple(tool for part in parts for tool in part.tools),
    )


def _parts(field: str, value: list[Any]) -> Iterator[_Content]:
    for index, part in enumerate(value):
        name = f"{field}[{index}]"
        if isinstance(part, str):
            yield _Content(part)
            continue
        kind = str(part.get("type", "text")).lower()
        if kind in PARTS:
            raise media_error(PARTS[kind], name)
        yield _part(name, kind, part)


def _part(name: str, kind: str, part: Mapping[str, Any]) -> _Content:
    if kind in ("text", "input_text", "output_text"):
        key, value = _one_of(name, part, ("text", "value", "content"))
        return _Content(value if value == "" else text(f"{name}.{key}", value))
    if kind in ("reasoning", "thinking", "reasoning_content"):
        key, value = _one_of(name, part, ("thinking", "reasoning", "text", "value", "content"))
        return _Content(reasoning=(text(f"{name}.{key}", value),))
    if kind in ("tool_call", "tool_use", "function_call", "tool_calls"):
        keys = ("value", "function", "tool_call", "tool_calls")
        call = next((part[key] for key in keys if key in part), part)
        return _Content(calls=read_calls(name, call))
    if kind in ("tools", "tool"):
        key, value = _one_of(name, part, ("value", "tools", "text"))
        return _Content(tools=read_tools(f"{name}.{key}", value))
    if kind in ("tool_result", "function_call_output"):
        key, value = _one_of(name, part, ("content", "output", "value", "text"))
        return _content(f"{name}.{key}", value, "tool")
    raise RowError(
        "unknown content part", f"field '{name}.type' is {describe(part.get('type'))}", f"{name}.type"
    )


def _one_of(name: str, part: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """Returns the first of these keys that a part has, and its value."""
    key = next((key for key in keys if key in part), None)
    if key is None:
        problem = f"field '{name}' must have {' or '.join(map(repr, keys[:2]))}, it is {describe(part)}"
        raise RowError(MISSING, problem, name)
    return key, part[key]
