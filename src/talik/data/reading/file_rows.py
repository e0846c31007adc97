"""Reads the rows of a data file, each with the line where it starts.

The kind of file is recognised by its content: JSON, JSON lines, CSV, TSV, Parquet, Arrow or plain text, each
also compressed (gz, zst, xz). One piece of the file is held at a time. A row that cannot be read becomes a
`Problem`, and reading continues; a file that cannot be read raises a `DataError`.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from talik.base.errors import DataError
from talik.data.reading.json_rows import BROKEN, LINES_REMEDY, json_document, json_lines, parse
from talik.data.reading.rows import Place, Problem, Row, is_list, is_object, refuse
from talik.data.reading.streams import DataFile, TextStream, as_file, head_of
from talik.data.reading.tables import arrow_rows, csv_rows, parquet_rows
from talik.data.reading.unreadable_files import check_head

TEXT = (".txt", ".md", ".text", ".markdown")
LINES = (".jsonl", ".ndjson")
PEEKED_ROWS = 100  # first rows from which the format of a file is recognised
READING_PROBLEMS = (BROKEN, "wrong number of fields", "not an object")  # kinds of problems found here
_COMPRESSED = (".gz", ".zst", ".xz")
# A first line with the names of columns, which prose does not match.
_HEADER = re.compile(rb"[\w-]{1,40}([,;\t])[\w-]{1,40}(\1[\w-]{1,40})*\r?\n")
# A line that starts with an object, as in JSON lines; inside a document, one only follows "[", "," or ":".
_SECOND_OBJECT = re.compile(rb"[^\s\[,:]\s*[\r\n]\{")


def rows_of(file: DataFile | Path | str) -> Iterator[Row | Problem]:
    """Yields the rows of a data file, and a problem for each row that cannot be read.

    Raises:
        DataError: The file cannot be read, has no rows, or its kind is not known.
    """
    file = as_file(file)
    found = False
    for row in _READERS[kind_of(file)](file):
        found = True
        yield row
    if not found:
        raise DataError("the file has no rows", where=file.name)


def first_rows(file: DataFile | Path | str) -> list[Row]:
    """Returns the readable rows among the first PEEKED_ROWS rows of a data file.

    Raises:
        DataError: The file cannot be read, has no rows, or its kind is not known.
    """
    return [row for row in islice(rows_of(file), PEEKED_ROWS) if isinstance(row, Row)]


def read_rows(file: DataFile | Path | str) -> list[Row]:
    """Reads all rows of a data file.

    Raises:
        DataError: The file, or some of its rows, cannot be read; the error lists the first places.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for row in rows_of(file):
        if isinstance(row, Problem):
            problems.append(row)
        else:
            rows.append(row)
    if problems:
        refuse([(problem.place, problem.text) for problem in problems], remedy_for(problems))
    return rows


def remedy_for(problems: list[Problem]) -> str:
    """Returns the remedy for rows that cannot be read, by the kind of the first."""
    if problems[0].kind == BROKEN:
        return LINES_REMEDY
    if problems[0].kind == "wrong number of fields":
        return "Put quotes around a field that contains a delimiter, quote or line break."
    return 'Write each row as {"field": "text", ...}.'


def check_file(path: Path) -> None:
    """Checks that a file can be read as data.

    Raises:
        DataError: The file does not exist, or is a folder, a pipe or a device.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        problem = "there is no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        raise DataError(problem, where=path) from None
    if stat.S_ISDIR(mode):
        raise DataError("this is a folder; a data file is needed", where=path)
    if not stat.S_ISREG(mode):
        remedy = "Name a file, or - for standard input."
        raise DataError("this is a pipe or a device, not a file", where=path, remedy=remedy)


def kind_of(file: DataFile) -> str:
    """Recognises the kind of a data file by its content, and where that is not enough by its name.

    Returns:
        A key of `_READERS`.

    Raises:
        DataError: The file is empty, or its content cannot be rows.
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
    """Returns the suffix of a file's name in lower case, without the suffix of a compression."""
    if path.suffix.lower() in _COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower()


def _lines_or_document(file: DataFile, suffix: str, head: bytes) -> str:
    """Distinguishes JSON lines from one JSON document, for a file that starts with an object."""
    lines = ((number, line) for number, line in TextStream(file).lines() if line is None or line.strip())
    first = next(lines)[1]
    try:
        line = (first or "").lstrip()
        value, end = parse(line)
        complete = not line[end:].strip()
    except (ValueError, RecursionError):
        value, complete = None, False
    if complete:
        is_only_line = next(lines, None) is None
        has_list = is_object(value) and is_list(value.get("data"))
        return "json" if is_only_line and has_list else "jsonl"
    return "jsonl" if suffix in LINES or _SECOND_OBJECT.search(head) else "json"


def _json(file: DataFile) -> Iterator[Row | Problem]:
    return json_document(TextStream(file))


def _json_lines(file: DataFile) -> Iterator[Row | Problem]:
    return json_lines(TextStream(file))


def _csv(file: DataFile) -> Iterator[Row | Problem]:
    return csv_rows(TextStream(file))


def _text(file: DataFile) -> Iterator[Row | Problem]:
    text = "".join(TextStream(file).pieces(1 << 20))
    yield Row(Place(file.name, 1), {"text": text})


_READERS: dict[str, Callable[[DataFile], Iterator[Row | Problem]]] = {
    "json": _json,
    "jsonl": _json_lines,
    "csv": _csv,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
    "text": _text,
}
