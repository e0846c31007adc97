"""Reads tool definitions and tool calls in their common forms, and returns the form that templates take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from talik.data.formats.fields import WRONG_TYPE, parsed
from talik.data.messages import ToolCall
from talik.data.reading.rows import RowError, describe, is_list, is_object

Tools = tuple[Mapping[str, Any], ...]
NO_TOOL = "wrong tool"


def read_tools(field: str, value: Any) -> Tools:
    """Reads tool definitions: one, a list, or the JSON text of either. Bare functions are wrapped.

    Raises:
        RowError: An item is not a tool definition.
    """
    if value in (None, "", [], "[]"):
        return ()
    found = parsed(field, value)
    found = [found] if is_object(found) else found
    if not is_list(found):
        raise RowError(WRONG_TYPE, f"field '{field}' must be a list of tools, it is {describe(value)}", field)
    return tuple(_tool(f"{field}[{i}]", tool) for i, tool in enumerate(found))


def _tool(field: str, value: Any) -> Mapping[str, Any]:
    tool = parsed(field, value)
    if is_object(tool) and is_object(function := tool.get("function")) and _has_name(function):
        return {"type": "function", **tool}
    if is_object(tool) and _has_name(tool):
        return {"type": "function", "function": tool}
    problem = f"field '{field}' must define a function with a 'name', it is {describe(value)}"
    raise RowError(NO_TOOL, problem, field)


def _has_name(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("name"), str)


def read_calls(field: str, value: Any) -> tuple[ToolCall, ...]:
    """Reads tool calls: one or a list, as objects or as JSON text.

    Raises:
        RowError: An item is not a tool call.
    """
    found = parsed(field, value)
    if not is_list(found):
        return (_call(field, found),)
    return tuple(_call(f"{field}[{i}]", call) for i, call in enumerate(found))


def _call(field: str, value: Any) -> ToolCall:
    call = parsed(field, value)
    function = call.get("function", call) if is_object(call) else None
    if not is_object(call) or not is_object(function) or not _has_name(function):
        problem = f"field '{field}' must be a call with a 'name' and 'arguments', it is {describe(value)}"
        raise RowError("wrong tool call", problem, field)
    call_id = call.get("id")
    return ToolCall(function["name"], _arguments(field, function), None if call_id is None else str(call_id))


def _arguments(field: str, function: Mapping[str, Any]) -> Any:
    """Returns the arguments of a call, parsed if they are JSON text; {} if there are none."""
    name = next((key for key in ("arguments", "input", "parameters") if key in function), "arguments")
    arguments = function.get(name)
    if isinstance(arguments, str):
        return parsed(f"{field}.{name}", arguments) if arguments.strip() else {}
    return {} if arguments is None else arguments
