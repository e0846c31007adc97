"""Reads the rows of a data file, each with its line. The content decides the kind of the file.

JSON, JSON lines, CSV, TSV, Parquet, Arrow and plain text, compressed or not (gz, zst, xz). Only a piece of
the file is in memory at a time. A row that cannot be read is a problem with its place, and reading continues;
a file that cannot be read is an error.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path

from talik.base.errors import DataError
from talik.data.reading.guesses import check_head
from talik.data.reading.json_rows import BROKEN, LINES_REMEDY, json_document, json_lines, parse
from talik.data.reading.rows import Place, Problem, Row, refuse
from talik.data.reading.streams import DataFile, TextStream, as_file, head_of
from talik.data.reading.tables import arrow_rows, csv_rows, parquet_rows

TEXT = (".txt", ".md", ".text", ".markdown")
LINES = (".jsonl", ".ndjson")
READING = (BROKEN, "wrong number of fields", "not an object")  # kinds of problems that reading finds
_COMPRESSED = (".gz", ".zst", ".xz")
_HEADER = re.compile(
    rb"[\w-]{1,40}([,;\t])[\w-]{1,40}(\1[\w-]{1,40})*\r?\n"
)  # names of columns, and no prose
# A line that starts with an object, as in JSON lines; inside a document, one only follows "[", "," or ":".
_SECOND_OBJECT = re.compile(rb"[^\s\[,:]\s*[\r\n]\{")


def rows_of(file: DataFile | Path | str) -> Iterator[Row | Problem]:
    """The rows of a data file, one at a time, and the problems of those that cannot be read.

    Raises:
        DataError: The file cannot be read, or is of no known kind.
    """
    file = as_file(file)
    found = False
    for row in _READERS[kind_of(file)](file):
        found = True
        yield row
    if not found:
        raise DataError("the file has no rows", where=file.name)


def read_rows(file: DataFile | Path | str) -> list[Row]:
    """All rows of a data file.

    Raises:
        DataError: The file or rows of it cannot be read; the error has the first places.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for row in rows_of(file):
        (problems if isinstance(row, Problem) else rows).append(row)  # pyright: ignore[reportArgumentType]
    if problems:
        refuse([(problem.place, problem.text) for problem in problems], remedy_for(problems))
    return rows


def remedy_for(problems: list[Problem]) -> str:
    """What to do about rows that cannot be read, by the first of them."""
    if problems[0].kind == BROKEN:
        return LINES_REMEDY
    if problems[0].kind == "wrong number of fields":
        return "Put quotes around a field that holds the delimiter, a quote or a line break."
    return 'Write each row as {"field": "text", ...}.'


def check_file(path: Path) -> None:
    """Checks that a file can be read as data.

    Raises:
        DataError: There is no such file, or it is a folder, a pipe or a device.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        problem = "there is no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise DataError(problem, where=path) from None
    if stat.S_ISDIR(mode):
        raise DataError("this is a folder; a file of rows is needed", where=path)
    if not stat.S_ISREG(mode):
        remedy = "Name a file, or - for standard input."
        raise DataError("this is a pipe or a device, not a file", where=path, remedy=remedy)


def kind_of(file: DataFile) -> str:
    """The kind of a data file: a key of the readers, by its content and then its name.

    Raises:
        DataError: The file is empty, or holds no rows.
    """
    check_file(file.path)
    head = head_of(file)
    if not head.strip():
        raise DataError("the file is empty", where=file.name)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    check_head(head, file.name)
    suffix = suffix_of(file.path)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_text = suffix in TEXT
    if start.startswith(b"[") and not (is_text and not re.match(rb"\[\s*[{\]]", start)):
        return "json"
    if start.startswith(b"{") and not (is_text and not re.match(rb'\{\s*"', start)):
        return _lines_or_document(file, suffix, head)
    return "text" if is_text and not _HEADER.match(start) else "csv"


def suffix_of(path: Path) -> str:
    """The suffix of a file's name, without that of its compression."""
    if path.suffix.lower() in _COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower()


def _lines_or_document(file: DataFile, suffix: str, head: bytes) -> str:
    """The kind of a file that starts with an object: one object per line, or one document."""
    lines = ((number, line) for number, line in TextStream(file).lines() if line is None or line.strip())
    first = next(lines)[1]
    try:
        whole = first is not None and not first[parse(first, len(first) - len(first.lstrip()))[1] :].strip()
    except (ValueError, RecursionError):
        whole = False
    if whole:
        only = next(lines, None) is None
        has_list = only and isinstance(parse(first or "", 0)[0].get("data"), list)
        return "json" if has_list else "jsonl"
    return "jsonl" if suffix in LINES or _SECOND_OBJECT.search(head) else "json"


def _text(file: DataFile) -> Iterator[Row | Problem]:
    text = "".join(TextStream(file).pieces(1 << 20))
    yield Row(Place(file.name, 1), {"text": text})


_READERS = {
    "json": lambda file: json_document(TextStream(file)),
    "jsonl": lambda file: json_lines(TextStream(file)),
    "csv": lambda file: csv_rows(TextStream(file)),
    "parquet": parquet_rows,
    "arrow": arrow_rows,
    "text": _text,
}
