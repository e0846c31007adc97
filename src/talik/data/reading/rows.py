"""Rows, the places where they stand, and the problems that they have."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from talik.base.errors import DataError

SHOWN = 10


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file, or a row of a file that has no lines; the first is 1."""

    file: str
    line: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file}: row {self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the file; `place` is where it starts."""

    place: Place
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a row: where, of which kind (a few words, the same for all such rows), in words."""

    place: Place
    kind: str
    text: str
    field: str | None = None


class RowError(ValueError):
    """A row that cannot be used: what `Problem` says of it, but for the place, which the caller knows."""

    def __init__(self, kind: str, text: str, field: str | None = None, remedy: str | None = None) -> None:
        self.kind, self.text, self.field, self.remedy = kind, text, field, remedy
        super().__init__(text)

    def at(self, place: Place) -> Problem:
        return Problem(place, self.kind, self.text, self.field)


def refuse(problems: Sequence[tuple[Place, str]], remedy: str | None = None) -> NoReturn:
    """Raises one DataError that names the first ten of `problems`, one a line, and how many there are."""
    lines = [problems[0][1], *(f"{place}: {problem}" for place, problem in problems[1:SHOWN])]
    if len(problems) > 1:
        lines.append(f"{len(problems):,} rows in all")
    raise DataError("\n".join(lines), where=problems[0][0], remedy=remedy)


def describe(value: Any) -> str:
    """A value of a row in words: 'a number (5)', 'null', 'a list (["a", "b"])'; at most 80 characters."""
    if value is None:
        return "null"
    if value == "":
        return "an empty string"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    kind = kinds.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")
    return f"{kind} ({_shown(value)})"


def _shown(value: Any) -> str:
    """A value as JSON, or as Python writes it, cut to 60 characters, control characters as escapes."""
    if isinstance(value, str) and len(value) > 100:
        value = value[:100]  # the rest is not shown
    try:
        shown = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return visible(shown)


def visible(text: str) -> str:
    """A text with escapes for characters that would steer a terminal or turn the direction of writing."""
    if text.isascii() and text.isprintable():
        return text
    steering = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in steering else c for c in text
    )
