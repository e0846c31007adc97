"""Properties of reading: any rows are read back, each with the line where it starts."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from talik.data.reading import json_rows, streams
from talik.data.reading.file_rows import rows_of
from talik.data.reading.rows import Problem

TEXTS = st.text(st.sampled_from('ab ",;\t\n{}[]:\\é你🎉\u2028\ufeff'), max_size=12)
VALUES = st.recursive(
    TEXTS | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(
    st.sampled_from(["input", "output", "a:b", 'say "x"']), VALUES, min_size=1, max_size=4
)
BROKEN = st.sampled_from(['{"a": 1,', '{"a": 1} {"a": 2}', '{"a": 1, "a": 2}', "[1]", "{", '{"a": NaN}'])
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "rows"


def read(path: Path, text: str, line_end: str, mark: bool) -> list[tuple[int, Any]]:
    """Reads a file in small pieces; returns the line and the fields of each row, None for a problem."""
    raw = text.replace("\n", line_end).encode()
    path.write_bytes(b"\xef\xbb\xbf" + raw if mark else raw)
    with mock.patch.object(json_rows, "_PIECE", 16), mock.patch.object(streams, "_READ", 16):
        rows = list(rows_of(path))
    return [(row.place.line, None if isinstance(row, Problem) else row.fields) for row in rows]


@given(
    first=OBJECTS,
    lines=st.lists(OBJECTS | BROKEN | st.sampled_from(["", "  "]), max_size=8),
    ascii_only=st.booleans(),
    line_end=LINE_ENDS,
    mark=st.booleans(),
)
def test_json_lines(
    path: Path, first: dict[str, Any], lines: list[Any], ascii_only: bool, line_end: str, mark: bool
) -> None:
    written = [
        line if isinstance(line, str) else json.dumps(line, ensure_ascii=ascii_only)
        for line in (first, *lines)
    ]
    expected = [
        (number, None if isinstance(line, str) else line)
        for number, line in enumerate((first, *lines), start=1)
        if not isinstance(line, str) or line.strip()
    ]
    assert read(path.with_suffix(".jsonl"), "\n".join(written) + "\n", line_end, mark) == expected


@given(
    # A line of a document that starts with "{" would look like JSON lines: blanks stand before each row.
    rows=st.lists(st.tuples(OBJECTS, st.sampled_from(["", " ", "\n ", "\n\n "])), min_size=1, max_size=6),
    indent=st.sampled_from([None, 2]),
    under_data=st.booleans(),
    line_end=LINE_ENDS,
    mark=st.booleans(),
)
def test_a_json_list(
    path: Path,
    rows: list[tuple[dict[str, Any], str]],
    indent: int | None,
    under_data: bool,
    line_end: str,
    mark: bool,
) -> None:
    text, expected = ('{"version": 1,\n"data": [' if under_data else "["), list[tuple[int, Any]]()
    for number, (row, blanks) in enumerate(rows):
        text += ("," if number else "") + blanks
        expected.append((text.count("\n") + 1, row))
        text += json.dumps(row, indent=indent) + blanks
    assert read(path.with_suffix(".json"), text + ("]}" if under_data else "]"), line_end, mark) == expected


@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8),
    blank=st.integers(0, 2),
    delimiter=st.sampled_from(",;\t"),
    line_end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
)
def test_csv(
    path: Path, rows: list[tuple[str, str]], blank: int, delimiter: str, line_end: str, mark: bool
) -> None:
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter, lineterminator="\n")
    table.write("\n" * blank)
    writer.writerow(["question", "answer"])
    expected: list[tuple[int, Any]] = []
    for question, answer in rows:
        expected.append((table.getvalue().count("\n") + 1, {"question": question, "answer": answer}))
        writer.writerow([question, answer])
    assert read(path.with_suffix(".csv"), table.getvalue(), line_end, mark) == expected
