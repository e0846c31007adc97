"""Rows of JSON and JSON lines, read piece by piece: a file is never held as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from talik.base.errors import DataError
from talik.data.reading.rows import Place, Problem, Row, describe, visible
from talik.data.reading.streams import LONGEST_ROW, TextStream

BROKEN = "broken JSON"
_BLANK = re.compile(r"[ \t\n]*")
_PIECE = 1 << 20  # characters that are read at once
LINES_REMEDY = "JSON lines need one whole object on each line; a list of objects is read as well."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {visible(twice[:60])!r} is given twice")
    return made


_FAST = json.JSONDecoder(parse_constant=_refuse_constant)
_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_once)


def parse(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value at a character of a text, and where it ends.

    Raises:
        ValueError: It is broken, or an object has a key twice.
        RecursionError: It is nested too deeply.
    """
    value, end = _FAST.raw_decode(text, at)
    # Every key stands before a colon. More colons than keys: in a text, or of a key that is given twice.
    if _keys(value) != text.count('":', at, end):
        _STRICT.raw_decode(text, at)
    return value, end


def _keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(_keys(inner) for inner in value.values() if not isinstance(inner, str))
    return sum(_keys(inner) for inner in value) if isinstance(value, list) else 0


def reason(error: Exception) -> str:
    """Why a JSON value could not be read, in words."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at column {error.colno}: {error.msg}"
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    return f"broken JSON: {'a number has too many digits' if 'digits' in str(error) else error}"


def row_of_line(place: Place, line: str) -> Row | Problem:
    """The row of one line of JSON lines."""
    try:
        start = _BLANK.match(line)
        value, end = parse(line, start.end() if start else 0)
        if rest := line[end:].strip():
            raise json.JSONDecodeError("Extra data", line, line.index(rest, end))
    except (ValueError, RecursionError) as error:
        return Problem(place, BROKEN, reason(error))
    return as_row(place, value)


def as_row(place: Place, value: Any) -> Row | Problem:
    """A JSON value as a row: it must be an object."""
    if isinstance(value, dict):
        return Row(place, value)
    return Problem(place, "not an object", f"a row must be a JSON object, this is {describe(value)}")


def json_lines(stream: TextStream) -> Iterator[Row | Problem]:
    """The rows of JSON lines; a line that cannot be read is a problem, and the next one is read."""
    for number, line in stream.lines():
        place = stream.place(number)
        if line is None:
            problem = f"the row has more than {LONGEST_ROW >> 20} MiB, the most that is read"
            yield Problem(place, "row too large", problem)
        elif line.strip():
            yield row_of_line(place, line)


def json_document(stream: TextStream) -> Iterator[Row | Problem]:
    """The rows of a JSON file: a list of objects, one object with the list under "data", or one object."""
    reader = _Reader(stream)
    if reader.peek() == "[":
        yield from _list(reader, end_of_file=True)
        return
    text = reader.whole()
    start = reader.at
    try:
        value, end = parse(text, start)
        if rest := text[end:].strip():
            raise json.JSONDecodeError("Extra data", text, text.index(rest, end))
    except (ValueError, RecursionError) as error:
        raise reader.broken(error) from None
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        yield as_row(stream.place(reader.line), value)
        return
    reader.move(_list_under_data(text, start))
    yield from _list(reader, end_of_file=False)


def _list_under_data(text: str, at: int) -> int:
    """Where the list under "data" starts, in an object at `at` that is known to be sound."""
    while True:
        key, at = _FAST.raw_decode(text, _skip(text, at + 1))
        at = _skip(text, _skip(text, at) + 1)
        if key == "data" and text.startswith("[", at):
            return at
        at = _skip(text, _FAST.raw_decode(text, at)[1])


def _skip(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return blank.end() if blank else at


class _Reader:
    """A text that is read as far as it is needed; `line` is the line of the character at `at`."""

    def __init__(self, stream: TextStream) -> None:
        self.stream, self.at, self.line = stream, 0, 1
        self._pieces = stream.pieces(_PIECE)
        self._text, self._ended = "", False
        self._before = 0  # characters of the line of `_text`'s start that are gone

    def more(self) -> bool:
        """Reads a piece; False at the end of the file."""
        piece = next(self._pieces, None)
        if piece is None:
            self._ended = True
            return False
        gone = self._text[: self.at]
        self._before = len(gone) - gone.rfind("\n") - 1 if "\n" in gone else self._before + len(gone)
        self._text, self.at = self._text[self.at :] + piece, 0
        return True

    def whole(self) -> str:
        """The text from here to the end of the file."""
        self.skip()
        while self.more():
            if len(self._text) > LONGEST_ROW:
                problem = f"one JSON object has more than {LONGEST_ROW >> 20} MiB, the most that is read"
                raise DataError(problem, where=self.stream.place(self.line), remedy=LINES_REMEDY)
        return self._text

    def skip(self) -> None:
        """Goes over blanks."""
        while True:
            self.move(_skip(self._text, self.at))
            if self.at < len(self._text) or not self.more():
                return

    def move(self, at: int) -> None:
        self.line += self._text.count("\n", self.at, at)
        self.at = at

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        self.skip()
        return self._text[self.at : self.at + 1]

    def value(self) -> Any:
        """The value that starts here. Raises what `parse` raises."""
        while True:
            try:
                value, end = parse(self._text, self.at)
                if end < len(self._text) or not self.more():
                    self.move(end)
                    return value
            except (ValueError, RecursionError):
                if len(self._text) - self.at > LONGEST_ROW or not self.more():
                    raise

    def broken(self, error: Exception) -> DataError:
        """The error with its line and column in the file."""
        if not isinstance(error, json.JSONDecodeError):
            return DataError(reason(error), where=self.stream.place(self.line))
        between = self._text.count("\n", self.at, error.pos)
        before = 0 if "\n" in self._text[: error.pos] else self._before
        where = self.stream.place(self.line + between)
        return DataError(f"broken JSON at column {error.colno + before}: {error.msg}", where=where)

    def fault(self, message: str) -> DataError:
        """An error at the character here."""
        return self.broken(json.JSONDecodeError(message, self._text, self.at))


def _list(reader: _Reader, *, end_of_file: bool) -> Iterator[Row | Problem]:
    """Each element of the list that starts here, with its line."""
    reader.move(reader.at + 1)
    more = reader.peek() != "]"
    while more:
        reader.skip()
        place = reader.stream.place(reader.line)
        try:
            value = reader.value()
        except (ValueError, RecursionError) as error:
            raise reader.broken(error) from None
        yield as_row(place, value)
        more = (after := reader.peek()) == ","
        if not more and after != "]":
            raise reader.fault("Expecting ',' or ']'")
        if more:
            reader.move(reader.at + 1)
    if end_of_file:
        reader.move(reader.at + 1)
        if reader.peek():
            raise reader.fault("More text after the list's end")
