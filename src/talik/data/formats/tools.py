"""Definitions of tools and calls of them, in the shapes that people write, as those that templates take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from talik.data.formats.fields import WRONG_TYPE, parsed
from talik.data.messages import ToolCall
from talik.data.reading.rows import RowError, describe

Tools = tuple[Mapping[str, Any], ...]
NO_TOOL = "wrong tool"


def read_tools(field: str, value: Any) -> Tools:
    """Definitions of tools: a list or its JSON text; bare functions are wrapped.

    Raises:
        RowError: One of them is not a definition.
    """
    if value in (None, "", [], "[]"):
        return ()
    found = parsed(field, value)
    found = [found] if isinstance(found, Mapping) else found
    if not isinstance(found, list):
        raise RowError(WRONG_TYPE, f"field '{field}' must be a list of tools, it is {describe(value)}", field)
    return tuple(_tool(f"{field}[{i}]", tool) for i, tool in enumerate(found))


def _tool(field: str, value: Any) -> Mapping[str, Any]:
    tool = parsed(field, value)
    if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
        function = tool["function"]
        if isinstance(function.get("name"), str):
            return {"type": "function", **tool}
    if isinstance(tool, Mapping) and isinstance(tool.get("name"), str):
        return {"type": "function", "function": tool}
    problem = f"field '{field}' must define a function with a 'name', it is {describe(value)}"
    raise RowError(NO_TOOL, problem, field)


def read_calls(field: str, value: Any) -> tuple[ToolCall, ...]:
    """Calls of tools: one or a list, as objects or their JSON text.

    Raises:
        RowError: One of them is not a call.
    """
    found = parsed(field, value)
    if not isinstance(found, list):
        return (_call(field, found),)
    return tuple(_call(f"{field}[{i}]", call) for i, call in enumerate(found))


def _call(field: str, value: Any) -> ToolCall:
    call = parsed(field, value)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        problem = f"field '{field}' must be a call with a 'name' and 'arguments', it is {describe(value)}"
        raise RowError("wrong tool call", problem, field)
    name = next((key for key in ("arguments", "input", "parameters") if key in function), "arguments")
    arguments = function.get(name)
    if isinstance(arguments, str):
        arguments = parsed(f"{field}.{name}", arguments) if arguments.strip() else {}
    identity = call.get("id") if isinstance(call, Mapping) else None
    return ToolCall(
        function["name"], {} if arguments is None else arguments, None if identity is None else str(identity)
    )
