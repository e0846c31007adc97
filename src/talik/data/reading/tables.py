"""Reads rows of CSV, TSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from talik.base.errors import DataError
from talik.data.reading.rows import Place, Problem, Row, describe, visible
from talik.data.reading.streams import DataFile, TextStream

LONGEST_FIELD = 2**31 - 1  # a C long on Windows; the csv module's own limit is 128 KiB
BATCH = 1000  # rows converted to Python objects at a time


def csv_rows(stream: TextStream) -> Iterator[Row | Problem]:
    """Yields the rows of a CSV or TSV file. The first line names the columns."""
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        lines = (f"{line or ''}\n" for _, line in stream.lines())
        first = next((line for line in lines if line.strip()), "")
        skipped = _blank_lines(stream)
        delimiter = max(",\t;", key=first.count)
        reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
        yield from _records(reader, stream, skipped)
    finally:
        csv.field_size_limit(limit)


def _chain(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def _blank_lines(stream: TextStream) -> int:
    """Counts the blank lines before the first line with text."""
    count = 0
    for _, line in stream.lines():
        if line is None or line.strip():
            break
        count += 1
    return count


def _records(reader: Any, stream: TextStream, skipped: int) -> Iterator[Row | Problem]:
    columns: list[str] = []
    while True:
        place = stream.place(skipped + reader.line_num + 1)
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DataError(f"broken CSV in the record that starts here: {error}", where=place) from None
        if record is None:
            return
        if not record:
            continue
        if not columns:
            columns = _columns(record, place)
        elif len(record) != len(columns):
            problem = f"{len(record)} fields where the header has {len(columns)}"
            yield Problem(place, "wrong number of fields", problem)
        else:
            yield Row(place, dict(zip(columns, record, strict=True)))


def _columns(record: list[str], place: Place) -> list[str]:
    if len(record) == 1 or Path(place.file).suffix in (".json", ".jsonl", ".ndjson"):
        raise DataError(
            f"this is neither JSON, JSON lines nor a table: it starts with {describe(record[0])}",
            where=place,
            remedy="A table (CSV, TSV) starts with a line that names at least two columns.",
        )
    twice = sorted(name for name, count in Counter(record).items() if count > 1)
    if twice or "" in record:
        name = visible(twice[0][:60]) if twice else ""
        problem = f"two columns have the name {name!r}" if name else "a column has no name"
        shown = ", ".join(repr(visible(column[:60])) for column in record[:30])
        more = f" and {len(record) - 30:,} more" if len(record) > 30 else ""
        raise DataError(f"{problem}; the columns are {shown}{more}", where=place)
    return record


def parquet_rows(file: DataFile) -> Iterator[Row | Problem]:
    """Yields the rows of a Parquet file."""
    pa = _pyarrow()
    try:
        with pa.parquet.ParquetFile(file.path) as opened:
            yield from _numbered(opened.iter_batches(batch_size=BATCH), file)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "Parquet", error) from None


def arrow_rows(file: DataFile) -> Iterator[Row | Problem]:
    """Yields the rows of an Arrow file, or of an Arrow stream as written by `datasets`."""
    pa = _pyarrow()
    try:
        with pa.memory_map(str(file.path)) as source:
            try:
                opened = pa.ipc.open_file(source)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            yield from _numbered(batches, file)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, "Arrow", error) from None


def _pyarrow() -> Any:
    """Imports pyarrow, which takes too long for the start of every command, and has no types."""
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow.parquet  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]

    return pyarrow


def _numbered(batches: Iterator[Any], file: DataFile) -> Iterator[Row | Problem]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            for fields in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield Row(Place(file.name, number, "row"), fields)


def _unreadable(file: DataFile, kind: str, error: Exception) -> DataError:
    problem = f"the {kind} file cannot be read: {str(error).splitlines()[0][:200]}"
    return DataError(problem, where=file.name, remedy="Download the file again, or write it again.")
