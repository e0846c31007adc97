"""Rows -> conversations. A data format is one entry in `FORMATS`.

The format is recognised from the fields of the rows and is the same for all rows of a file. A row that does
not hold what its format needs is an error with its place, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from talik.data.messages import Conversation, Message
from talik.data.rows import Row, describe, refuse
from talik.errors import DataError, UsageError

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
NOT_USED = ("tool_calls", "function_call", "reasoning_content", "thinking")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Format:
    """A data format: the fields that a row must have, and how they become messages.

    `convert` raises ValueError with the problem in words.
    """

    needs: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], list[Message]]


def _messages(fields: Mapping[str, Any]) -> list[Message]:
    return _message_list("messages", fields["messages"], "role", "content", {role: role for role in ROLES})


def _sharegpt(fields: Mapping[str, Any]) -> list[Message]:
    turns = _message_list("conversations", fields["conversations"], "from", "value", SHAREGPT_ROLES)
    return _system(fields) + turns


def _instruction(fields: Mapping[str, Any]) -> list[Message]:
    question = _text("instruction", fields["instruction"])
    if fields.get("input") not in (None, ""):
        question += "\n\n" + _text("input", fields["input"])
    return [*_system(fields), *_turn(question, _text("output", fields["output"]))]


def _prompt_completion(fields: Mapping[str, Any]) -> list[Message]:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise ValueError("fields 'prompt' and 'completion' must both be strings or both be lists of messages")
    if isinstance(prompt, list):
        sides = (("prompt", prompt), ("completion", completion))
        roles = {role: role for role in ROLES}
        return [m for name, side in sides for m in _message_list(name, side, "role", "content", roles)]
    return [*_system(fields), *_turn(_text("prompt", prompt), _text("completion", completion))]


def _two_fields(asked: str, answered: str) -> Format:
    def convert(fields: Mapping[str, Any]) -> list[Message]:
        return [*_system(fields), *_turn(_text(asked, fields[asked]), _text(answered, fields[answered]))]

    return Format((asked, answered), convert)


# The first whose fields a row has is its format: 'instruction' rows have 'input' and 'output' too.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages),
    "conversations": Format(("conversations",), _sharegpt),
    "instruction": Format(("instruction", "output"), _instruction),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion),
    "input-output": _two_fields("input", "output"),
}


def conversations(
    rows: list[Row], input_field: str | None = None, output_field: str | None = None
) -> tuple[str, list[Conversation]]:
    """The name of the rows' data format and one conversation a row.

    With `input_field` and `output_field` the format is "fields". Raises DataError with the first places of
    the rows that do not hold what the format needs.
    """
    if (input_field is None) != (output_field is None):
        given, other = ("input", "output") if input_field is not None else ("output", "input")
        raise UsageError(
            f"--{given}-field needs --{other}-field", remedy=f"Give both or neither: {_columns(rows)}"
        )
    if input_field is None or output_field is None:
        name = _recognise(rows)
        return name, _convert_all(rows, FORMATS[name], f"the format '{name}' needs it")
    named = _two_fields(input_field, output_field)
    return "fields", _convert_all(rows, named, _columns(rows))


def _columns(rows: list[Row]) -> str:
    return f"the fields of the first row are {', '.join(map(repr, rows[0].fields))}"


def _format_of(row: Row) -> str | None:
    return next((name for name, form in FORMATS.items() if row.fields.keys() >= set(form.needs)), None)


def _recognise(rows: list[Row]) -> str:
    """The one format of all rows that have one; a row that has none is left to the conversion."""
    first: dict[str, Row] = {}
    for row in rows:
        name = _format_of(row)
        if name is not None:
            first.setdefault(name, row)
    if not first:
        known = "; ".join(f"{name}: {', '.join(form.needs)}" for name, form in FORMATS.items())
        raise DataError(
            f"no data format has these fields; {_columns(rows)}",
            where=rows[0].place,
            remedy=f"Name the fields with --input-field and --output-field, or use a known format ({known}).",
        )
    if len(first) > 1:
        places = ", ".join(f"'{name}' first in {row.place}" for name, row in first.items())
        raise DataError(
            f"the rows have {len(first)} formats: {places}",
            where=next(iter(first.values())).place,
            remedy="Put the rows of each format into a file of its own.",
        )
    return next(iter(first))


def _convert_all(rows: list[Row], form: Format, lacking: str) -> list[Conversation]:
    converted, problems = [], []
    for row in rows:
        try:
            missing = [name for name in form.needs if name not in row.fields]
            if missing:
                raise ValueError(f"field '{missing[0]}' is missing; {lacking}")
            converted.append(Conversation(_checked(form.convert(row.fields)), row.place))
        except ValueError as problem:
            problems.append((row.place, str(problem)))
    if problems:
        refuse(problems, "Correct these rows or take them out of the file.")
    return converted


def _checked(messages: list[Message]) -> tuple[Message, ...]:
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("a system message must come first, and only once")
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("no message is the assistant's, so there is nothing to train")
    if messages[-1].role != "assistant":
        raise ValueError(f"the last message is the {messages[-1].role}'s; it must be the assistant's")
    return tuple(messages)


def _message_list(
    field: str, value: Any, role_key: str, content_key: str, roles: Mapping[str, str]
) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"field '{field}' must be a list of messages, it is {describe(value)}")
    messages = []
    for index, item in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(item, dict) or not {role_key, content_key} <= item.keys():
            wanted = f"an object with '{role_key}' and '{content_key}'"
            raise ValueError(f"field '{name}' must be {wanted}, it is {describe(item)}")
        unused = [key for key in NOT_USED if item.get(key)]
        if unused:
            raise ValueError(f"field '{name}.{unused[0]}' cannot be trained; only '{content_key}' is read")
        role = item[role_key]
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"field '{name}.{role_key}' is {describe(role)}; known are {', '.join(roles)}")
        messages.append(Message(roles[role], _text(f"{name}.{content_key}", item[content_key])))
    return messages


def _turn(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


def _system(fields: Mapping[str, Any]) -> list[Message]:
    if fields.get("system") in (None, ""):
        return []
    return [Message("system", _text("system", fields["system"]))]


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"field '{field}' must be a string, it is {describe(value)}")
    if not value.strip():
        raise ValueError(f"field '{field}' is {'empty' if not value else 'blank'}")
    half = _HALF_CHARACTER.search(value)
    if half:
        raise ValueError(
            f"field '{field}' holds half a character (\\u{ord(half[0]):x}) at position {half.start()}"
        )
    return value
