"""Reads rows of JSON and JSON lines piece by piece, so that memory does not grow with the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from talik.base.errors import DataError
from talik.data.reading.rows import Place, Problem, Row, describe, is_list, is_object, too_large, visible
from talik.data.reading.streams import LONGEST_ROW, TextStream

BROKEN = "broken JSON"
_BLANK = re.compile(r"[ \t\n]*")
_PIECE = 1 << 20  # bytes read at a time
LINES_REMEDY = "JSON lines need one complete object on each line. A JSON list of objects can be read, too."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of its pairs; ValueError if a key is repeated."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {visible(twice[:60])!r} is given twice")
    return made


_FAST = json.JSONDecoder(parse_constant=_refuse_constant)
_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def parse(text: str, at: int = 0) -> tuple[Any, int]:
    """Decodes the JSON value at a position of a text.

    Returns:
        The value, and the position after it.

    Raises:
        ValueError: The JSON is invalid, or an object has a repeated key.
        RecursionError: The value is nested too deeply.
    """
    value, end = _FAST.raw_decode(text, at)
    # The fast decoder keeps the last of repeated keys. Every key is followed by `":`, so more of these than
    # keys mean a repeated key, or a string with `":` in it: the strict decoder, which is slower, decides.
    if _count_keys(value) != text.count('":', at, end):
        _STRICT.raw_decode(text, at)
    return value, end


def _count_keys(value: Any) -> int:
    """Counts the keys of all objects in a JSON value."""
    inner: Any
    count = 0
    if isinstance(value, dict):
        count = len(value)  # pyright: ignore[reportUnknownArgumentType]
        for inner in value.values():  # pyright: ignore[reportUnknownVariableType]
            if not isinstance(inner, str):
                count += _count_keys(inner)
    elif isinstance(value, list):
        for inner in value:  # pyright: ignore[reportUnknownVariableType]
            count += _count_keys(inner)
    return count


def reason(error: Exception) -> str:
    """Describes why a JSON value could not be read."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at column {error.colno}: {error.msg}"
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    return f"broken JSON: {'a number has too many digits' if 'digits' in str(error) else error}"


def row_of_line(place: Place, line: str) -> Row | Problem:
    """Reads the row of one line of JSON lines."""
    try:
        start = _BLANK.match(line)
        value, end = parse(line, start.end() if start else 0)
        if rest := line[end:].strip():
            raise json.JSONDecodeError("Extra data", line, line.index(rest, end))
    except (ValueError, RecursionError) as error:
        return Problem(place, BROKEN, reason(error))
    return as_row(place, value)


def as_row(place: Place, value: Any) -> Row | Problem:
    """Returns a JSON object as a row; a problem for another value."""
    if isinstance(value, dict):
        return Row(place, value)  # pyright: ignore[reportUnknownArgumentType]
    return Problem(place, "not an object", f"a row must be a JSON object, this is {describe(value)}")


def json_lines(stream: TextStream) -> Iterator[Row | Problem]:
    """Yields the rows of JSON lines. A line that cannot be read is yielded as a problem."""
    for number, line in stream.lines():
        place = stream.place(number)
        if line is None:
            yield too_large(place, LONGEST_ROW)
        elif line.strip():
            yield row_of_line(place, line)


def json_document(stream: TextStream) -> Iterator[Row | Problem]:
    """Yields the rows of a JSON file: a list of objects, an object with a list "data", or one object."""
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
    if not is_object(value) or not is_list(value.get("data")):
        yield as_row(stream.place(reader.line), value)
        return
    reader.move(_list_under_data(text, start))
    yield from _list(reader, end_of_file=False)


def _list_under_data(text: str, at: int) -> int:
    """Returns the position of the list under "data" in a valid object at position `at`."""
    while True:
        key, at = _FAST.raw_decode(text, _skip(text, at + 1))
        at = _skip(text, _skip(text, at) + 1)
        if key == "data" and text.startswith("[", at):
            return at
        at = _skip(text, _FAST.raw_decode(text, at)[1])


def _skip(text: str, at: int) -> int:
    """Returns the position of the next character that is not blank."""
    blank = _BLANK.match(text, at)
    return blank.end() if blank else at


class _Reader:
    """A position in a JSON text that is read piece by piece.

    Attributes:
        at: The position in the pieces that are held.
        line: The line number of that position in the file.
    """

    def __init__(self, stream: TextStream) -> None:
        self.stream, self.at, self.line = stream, 0, 1
        self._pieces = stream.pieces(_PIECE)
        self._text = ""
        self._before = (
            0  # characters between the start of the line and the start of `_text`, which are dropped
        )

    def more(self) -> bool:
        """Reads one more piece and drops the text before `at`; False at the end of the file."""
        piece = next(self._pieces, None)
        if piece is None:
            return False
        dropped = self._text[: self.at]
        new_line = "\n" in dropped
        self._before = len(dropped) - dropped.rfind("\n") - 1 if new_line else self._before + len(dropped)
        self._text, self.at = self._text[self.at :] + piece, 0
        return True

    def whole(self) -> str:
        """Reads to the end of the file and returns the text from here on."""
        self.skip()
        while self.more():
            if len(self._text) > LONGEST_ROW:
                problem = f"a JSON object has more than {LONGEST_ROW >> 20} MiB, the most that is read"
                raise DataError(problem, where=self.stream.place(self.line), remedy=LINES_REMEDY)
        return self._text

    def skip(self) -> None:
        """Moves to the next character that is not blank."""
        while True:
            self.move(_skip(self._text, self.at))
            if self.at < len(self._text) or not self.more():
                return

    def move(self, at: int) -> None:
        """Moves to a position in the text that is held."""
        self.line += self._text.count("\n", self.at, at)
        self.at = at

    def peek(self) -> str:
        """Returns the next character that is not blank; "" at the end of the file."""
        self.skip()
        return self._text[self.at : self.at + 1]

    def value(self) -> Any:
        """Reads the value that starts here; raises the errors of `parse`."""
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
        """Returns an error with its line and column in the file."""
        if not isinstance(error, json.JSONDecodeError):
            return DataError(reason(error), where=self.stream.place(self.line))
        between = self._text.count("\n", self.at, error.pos)
        before = 0 if "\n" in self._text[: error.pos] else self._before
        where = self.stream.place(self.line + between)
        return DataError(f"broken JSON at column {error.colno + before}: {error.msg}", where=where)

    def syntax_error(self, message: str) -> DataError:
        """Returns a syntax error at the current position."""
        return self.broken(json.JSONDecodeError(message, self._text, self.at))


def _list(reader: _Reader, *, end_of_file: bool) -> Iterator[Row | Problem]:
    """Yields each element of the list that starts here; `end_of_file`: nothing may follow the list."""
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
            raise reader.syntax_error("Expecting ',' or ']'")
        if more:
            reader.move(reader.at + 1)
    if end_of_file:
        reader.move(reader.at + 1)
        if reader.peek():
            raise reader.syntax_error("More text after the list's end")
