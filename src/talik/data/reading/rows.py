"""Rows, their places in files, and the problems found in them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeGuard

from talik.base.errors import DataError

SHOWN = 10  # problems that an error message lists
ROW_TOO_LARGE = "row too large"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a row: a line number, or a row number in a file without lines; both start at 1."""

    file: str
    line: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file}: row {self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """The fields of one row as the file holds them, and the place where the row starts."""

    place: Place
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used.

    Attributes:
        place: The place of the row.
        kind: The kind of problem: a few words, the same for all such rows.
        text: A description of the problem in this row.
        field: The field with the problem, if there is one.
    """

    place: Place
    kind: str
    text: str
    field: str | None = None


class RowError(ValueError):
    """A row cannot be used. It has the attributes of `Problem` except the place, which `at` adds."""

    def __init__(self, kind: str, text: str, field: str | None = None, remedy: str | None = None) -> None:
        self.kind, self.text, self.field, self.remedy = kind, text, field, remedy
        super().__init__(text)

    def at(self, place: Place) -> Problem:
        """Returns the problem with its place."""
        return Problem(place, self.kind, self.text, self.field)


def refuse(problems: Sequence[tuple[Place, str]], remedy: str | None = None) -> NoReturn:
    """Raises a DataError that lists the first ten problems, one a line, and the total number."""
    lines = [problems[0][1], *(f"{place}: {problem}" for place, problem in problems[1:SHOWN])]
    if len(problems) > 1:
        lines.append(f"{len(problems):,} rows in all")
    raise DataError("\n".join(lines), where=problems[0][0], remedy=remedy)


def too_large(place: Place, most: int) -> Problem:
    """Returns the problem of a row with more than `most` characters."""
    return Problem(place, ROW_TOO_LARGE, f"the row has more than {most >> 20} MiB, the most that is read")


def is_object(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """True if a value is a JSON object."""
    return isinstance(value, Mapping)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """True if a value is a JSON list."""
    return isinstance(value, list)


def describe(value: Any) -> str:
    """Describes a value in at most 80 characters: 'a number (5)', 'null', 'a list (["a", "b"])'."""
    if value is None:
        return "null"
    if value == "":
        return "an empty string"
    kinds: dict[type, str] = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    other = "an object" if is_object(value) else f"a {value.__class__.__name__}"
    kind = next((kind for of, kind in kinds.items() if value.__class__ is of), other)
    return f"{kind} ({_shown(value)})"


def _shown(value: Any) -> str:
    """Returns a value as JSON or as its repr, cut to 60 characters, with control characters escaped."""
    if isinstance(value, str) and len(value) > 100:
        value = value[:100]  # more than is shown
    try:
        shown = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return visible(shown)


def visible(text: str) -> str:
    """Escapes the characters of a text that control a terminal or change the direction of writing."""
    if text.isascii() and text.isprintable():
        return text
    control = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in control else c for c in text
    )
