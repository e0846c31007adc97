"""Reads the fields of one row by name, in any letter case, and records which fields were read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from talik.data.reading.rows import RowError, describe

EMPTY = "empty field"
WRONG_TYPE = "wrong type"
MISSING = "missing field"
BROKEN_TEXT = "broken character"
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class Fields:
    """The fields of a row, by their own names or by their names in lower case."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self._names = {name.lower(): name for name in fields} | {name: name for name in fields}
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(self, name: str) -> Any:
        """Returns the value of a field, or None, and records the field as read."""
        own = self._names.get(name, name)
        self._read.add(own)
        return self._fields.get(own)

    def named(self, name: str) -> str:
        """Returns the name of a field as the row spells it."""
        return self._names.get(name, name)

    def unread(self) -> list[str]:
        """Returns the names of the fields that are not empty and were not read."""
        return [n for n, value in self._fields.items() if n not in self._read and value not in (None, "", [])]

    def text(self, name: str) -> str:
        """Returns a field that must hold text.

        Raises:
            RowError: The field is empty or not a string.
        """
        return text(self.named(name), self.get(name))

    def optional(self, name: str) -> str:
        """Returns the text of a field; "" if the field is absent or empty."""
        value = self.get(name)
        return "" if value in (None, "") else text(self.named(name), value)


def text(field: str, value: Any) -> str:
    """Returns a value that must be text and not blank.

    Raises:
        RowError: The value is not a string, is blank, or contains half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RowError(WRONG_TYPE, f"field '{field}' must be a string, it is {describe(value)}", field)
    if not value.strip():
        raise RowError(EMPTY, f"field '{field}' is {'empty' if not value else 'blank'}", field)
    half = _HALF_CHARACTER.search(value)
    if half:
        problem = (
            f"field '{field}' contains half a character (\\u{ord(half[0]):x}) at position {half.start()}"
        )
        raise RowError(BROKEN_TEXT, problem, field)
    return value


def parsed(field: str, value: Any) -> Any:
    """Returns a value, parsed if it is JSON text.

    Raises:
        RowError: The text is not valid JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise RowError(
            "broken JSON", f"field '{field}' is not valid JSON ({reason}): {describe(value)}", field
        ) from None
