"""A file of rows -> rows, each with the file and the line where it starts.

JSON, JSON lines, CSV and TSV; which one a file is, its content says. Nothing is skipped: a row that cannot be
read is an error with its place.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from talik.errors import DataError

SHOWN = 10
BINARY = {b"PK\x03\x04": "an Excel or zip file", b"PAR1": "a Parquet file", b"\x1f\x8b": "a gzip file"}
LONGEST_FIELD = 2**31 - 1  # a C long on Windows; the csv module's own limit is 128 KiB
_DECODE = json.JSONDecoder().raw_decode
_BLANK = re.compile(r"[ \t\n]*")


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file; the first line is 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


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


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSON, JSON lines, CSV or TSV file in UTF-8.

    JSON is a list of objects, or one object that holds the list under "data". Raises DataError for a file or
    a row that cannot be read.
    """
    text = _read_text(path)
    found = list(_rows_of(text, path))
    wrong = [
        (Place(str(path), line), f"a row must be a JSON object, this is {describe(value)}")
        for line, value in found
        if not isinstance(value, dict)
    ]
    if wrong:
        refuse(wrong, 'Write each row as {"field": "text", ...}.')
    if not found:
        raise DataError("the file has no rows", where=path)
    return [Row(Place(str(path), line), value) for line, value in found]


def describe(value: Any) -> str:
    """A value of a row in words: 'a number (5)', 'null', 'a list (["a", "b"])'."""
    if value is None:
        return "null"
    if value == "":
        return "an empty string"
    kinds = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    shown = json.dumps(value, ensure_ascii=False)
    return f"{kinds[type(value)]} ({shown if len(shown) <= 60 else shown[:57] + '...'})"


def check_file(path: Path) -> None:
    """DataError if there is no such file."""
    if path.is_dir():
        raise DataError("this is a folder; a file of rows is needed", where=path)
    if not path.exists():
        raise DataError("there is no such file", where=path)


def _read_text(path: Path) -> str:
    check_file(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=path) from None
    if not raw.strip():
        raise DataError("the file is empty", where=path)
    for start, kind in BINARY.items():
        if raw.startswith(start):
            raise DataError(
                f"this is {kind}", where=path, remedy="Save the rows as JSON lines or CSV in UTF-8."
            )
    # One kind of line end, so that every line is counted the way editors count.
    return _decode(raw, path).replace("\r\n", "\n").replace("\r", "\n")


def _decode(raw: bytes, path: Path) -> str:
    remedy = "Save the file again as UTF-8."
    if b"\0" in raw[:1000]:
        raise DataError(
            "the file is not UTF-8; it looks like UTF-16", where=Place(str(path), 1), remedy=remedy
        )
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
    problem = f"the file is not UTF-8: byte {raw[offset]:#04x} at offset {offset:,}"
    try:
        raw.decode("gb18030")
        problem += "; it looks like GB18030 (GBK)"
    except UnicodeDecodeError:
        pass
    raise DataError(problem, where=Place(str(path), raw.count(b"\n", 0, offset) + 1), remedy=remedy)


def _rows_of(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    start = _skip(text, 0)
    if text.startswith("[", start):
        return _json_list(text, start, path, end_of_file=True)
    if not text.startswith("{", start):
        return _table(text, path)
    try:
        value, end = _DECODE(text, start)
    except json.JSONDecodeError as error:
        if path.suffix in (".jsonl", ".ndjson") or text.count("\n{", start) > 0:
            return _json_lines(text, path)
        raise _broken(error, path) from None
    if _skip(text, end) < len(text):
        return _json_lines(text, path)
    if not isinstance(value.get("data"), list):
        return iter([(text.count("\n", 0, start) + 1, value)])
    return _json_list(text, _list_under_data(text, start), path)


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    problems = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also split at U+2028
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            problems.append((Place(str(path), number), f"broken JSON at column {error.colno}: {error.msg}"))
    if problems:
        refuse(problems, "JSON lines need one whole object on each line; a list of objects is read as well.")


def _json_list(text: str, at: int, path: Path, end_of_file: bool = False) -> Iterator[tuple[int, Any]]:
    """Each element of the list that starts at `at`, with its line."""
    line, counted = 1, 0
    at = _skip(text, at + 1)
    more = not text.startswith("]", at)
    while more:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = _DECODE(text, at)
            yield line, value
            at = _skip(text, end)
            more = text.startswith(",", at)
            if not more and not text.startswith("]", at):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        except json.JSONDecodeError as error:
            raise _broken(error, path) from None
        at = _skip(text, at + 1) if more else at
    rest = _skip(text, at + 1)
    if end_of_file and rest < len(text):
        raise _broken(json.JSONDecodeError("More text after the list's end", text, rest), path)


def _list_under_data(text: str, at: int) -> int:
    """Where the list under "data" starts, in an object at `at` that is known to be sound."""
    while True:
        key, at = _DECODE(text, _skip(text, at + 1))
        at = _skip(text, _skip(text, at) + 1)
        if key == "data" and text.startswith("[", at):
            return at
        at = _skip(text, _DECODE(text, at)[1])


def _broken(error: json.JSONDecodeError, path: Path) -> DataError:
    where = Place(str(path), error.lineno)
    return DataError(f"broken JSON at column {error.colno}: {error.msg}", where=where)


def _skip(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return blank.end() if blank else at


def _table(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        first = text.lstrip("\n").split("\n", 1)[0]
        delimiter = max(",\t;", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        yield from _records(reader, path)
    finally:
        csv.field_size_limit(limit)


def _records(reader: Any, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Each record of a table with the line where it starts; the first names the columns."""
    columns: list[str] = []
    problems: list[tuple[Place, str]] = []
    while True:
        line = reader.line_num + 1
        place = Place(str(path), line)
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DataError(f"broken CSV in the record that starts here: {error}", where=place) from None
        if record is None:
            break
        if not record:
            continue
        if not columns:
            columns = _columns(record, place)
        elif len(record) != len(columns):
            problems.append((place, f"{len(record)} fields where the header has {len(columns)}"))
        else:
            yield line, dict(zip(columns, record, strict=True))
    if problems:
        refuse(problems, "Put quotes around a field that holds the delimiter, a quote or a line break.")


def _columns(record: list[str], place: Place) -> list[str]:
    if len(record) == 1 or Path(place.file).suffix in (".json", ".jsonl", ".ndjson"):
        start = describe(record[0])
        raise DataError(
            f"this is neither JSON, JSON lines nor a table: it starts with {start}",
            where=place,
            remedy="A table (CSV, TSV) starts with a line that names at least two columns.",
        )
    twice = sorted({name for name in record if record.count(name) > 1})
    if twice or "" in record:
        problem = f"two columns have the name {twice[0]!r}" if twice else "a column has no name"
        raise DataError(f"{problem}; the columns are {', '.join(map(repr, record))}", where=place)
    return record
