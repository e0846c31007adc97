"""Files of rows: the rows with their lines, and the errors with place and remedy."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talik.base.errors import DataError
from talik.data.reading.file_rows import read_rows
from talik.data.reading.rows import Place, refuse


def write(folder: Path, content: str | bytes, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


TWO = [{"input": "a", "output": "b"}, {"input": "c\nd", "output": "e"}]
SAME_ROWS = {
    "list": ('[\n  {"input": "a",\n   "output": "b"},\n\n  {"input": "c\\nd", "output": "e"}\n]\n', [2, 5]),
    "lines": ('{"input": "a", "output": "b"}\n\n{"input": "c\\nd", "output": "e"}', [1, 3]),
    "under data": (
        '{"version": {"data": 1},\n "data": [{"input": "a", "output": "b"},\n'
        ' {"input": "c\\nd", "output": "e"}]}',
        [2, 3],
    ),
    "csv": ('input,output\na,b\n"c\nd",e\n', [2, 3]),
    "tsv": ('input\toutput\na\tb\n\n"c\nd"\te\n', [2, 4]),
    "semicolons": ('input;output\na;b\n"c\nd";e', [2, 3]),
}


@pytest.mark.parametrize("name", ["rows.json", "rows.txt", "rows"])
@pytest.mark.parametrize("kind", SAME_ROWS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_content_says_what_a_file_is(tmp_path: Path, name: str, kind: str, bom: bytes, end: str) -> None:
    content, lines = SAME_ROWS[kind]
    if name == "rows.json" and kind in ("csv", "tsv", "semicolons"):
        name = "rows.csv"
    path = write(tmp_path, bom + content.replace("\n", end).encode("utf-8"), name)
    rows = read_rows(path)
    assert [row.fields for row in rows] == TWO
    assert [row.place for row in rows] == [Place(str(path), line) for line in lines]


def test_a_record_after_a_field_with_line_breaks_has_its_own_line(tmp_path: Path) -> None:
    path = write(tmp_path, 'q,a\n"one\n\nthree",x\nlast,y\n', "rows.csv")
    assert [row.place.line for row in read_rows(path)] == [2, 5]


def test_an_unusual_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": "x\u2028y\x85z"}\n{"a": "b"}\n', "rows.jsonl")
    assert [(row.fields["a"], row.place.line) for row in read_rows(path)] == [("x\u2028y\x85z", 1), ("b", 2)]


def test_one_object_over_many_lines_is_one_row(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path, '\n{\n "input": "a",\n "output": "b"\n}\n'))
    assert row.fields == TWO[0] and row.place.line == 2


def test_a_field_longer_than_the_csv_module_allows_is_read(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    (row,) = read_rows(write(tmp_path, f"q,a\n{long},b\n", "rows.csv"))
    assert row.fields["q"] == long
    assert csv.field_size_limit() == limit


BROKEN_LINES = "\n".join(['{"a": "b"}'] * 316 + ['{"a": }'] + ['{"a": "b"}'] * 3)
REFUSED = [
    ("empty.json", b"", None, "empty"),
    ("blank.json", b" \n\n", None, "empty"),
    ("none.json", b"[]", None, "no rows"),
    ("header.csv", b"a,b\n", None, "no rows"),
    ("rows.jsonl", BROKEN_LINES.encode(), 317, "broken JSON at column 7: Expecting value"),
    ("rows.json", BROKEN_LINES.encode(), 317, "column 7"),
    ("cut.json", b'[{"a": "b"},\n {"a": "c"}\n', 3, "Expecting ',' or ']'"),
    ("comma.json", b'[{"a": "b"}\n {"a": "c"}]', 2, "Expecting ',' or ']'"),
    ("trailing.json", b'[{"a": "b"},\n]', 2, "Expecting value"),
    ("key.json", b'[{"a": "b"},\n\n {a: "c"}]', 3, "column 3"),
    ("two.json", b'[{"a": "b"}]\n[{"a": "c"}]', 2, "after the list's end"),
    ("first.jsonl", b'{"a": "b",}\n{"a": "b"}', 1, "column 1"),
    ("numbers.json", b'[{"a": "b"},\n 5,\n null]', 2, "must be a JSON object, this is a number (5)"),
    (
        "numbers.json",
        b'[{"a": "b"},\n 5,\n null]',
        2,
        ":3: a row must be a JSON object, this is null\n2 rows in all",
    ),
    ("lists.jsonl", b'{"a": "b"}\n["a"]', 2, 'a list (["a"])'),
    ("gbk.json", '[{"a":\n "你好世界"}]'.encode("gb18030"), 2, "offset 9; it looks like GB18030"),
    ("bom.json", b'\xef\xbb\xbf[{"a":\n "\xff"}]', 2, "byte 0xff at offset 12"),
    ("utf16.json", '[{"a": "b"}]'.encode("utf-16"), 1, "UTF-16"),
    ("rows.xlsx", b"PK\x03\x04 and more", None, "an Excel or zip file"),
    ("rows.parquet", b"PAR1\x00\x00", None, "the Parquet file cannot be read"),
    ("twice.csv", b"a,b,a\n1,2,3\n", 1, "two columns have the name 'a'"),
    ("unnamed.csv", b"a,,b\n1,2,3\n", 1, "no name"),
    ("many.csv", b"a,b\n1,2\n1,2,3\n", 3, "3 fields where the header has 2"),
    ("few.csv", b"a,b\n1,2\n\n1\n", 4, "1 fields where the header has 2"),
    ("quote.csv", b'a,b\n1,2\n"open,3\n4,5\n', 3, "broken CSV"),
    ("text.csv", b"just a line of text\nand another\n", 1, "neither JSON, JSON lines nor a table"),
    ("yaml.json", b"a: b, c\nd: e, f\n", 1, "neither JSON"),
]


@pytest.mark.parametrize(("name", "content", "line", "said"), REFUSED)
def test_what_cannot_be_read_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, line: int | None, said: str
) -> None:
    path = write(tmp_path, content, name)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(str(path) if line is None else f"{path}:{line}: ")
    assert said in str(caught.value)


def test_other_encodings_come_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, "问,答\n".encode("gb18030"), "rows.csv"))
    assert caught.value.remedy is not None and "UTF-8" in caught.value.remedy


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="this is a folder"):
        read_rows(tmp_path)


def test_ten_places_and_the_count_are_named() -> None:
    problems = [(Place("f", n), f"wrong {n}") for n in range(1, 1235)]
    with pytest.raises(DataError) as caught:
        refuse(problems, "Do better.")
    lines = str(caught.value).split("\n")
    assert lines[0] == "f:1: wrong 1" and lines[9] == "f:10: wrong 10"
    assert lines[10:] == ["1,234 rows in all", "  Do better."]


def test_many_rows_of_a_list_are_read_with_their_lines(tmp_path: Path) -> None:
    made = [{"n": str(n), "text": "x\n" * (n % 3)} for n in range(300)]
    path = write(tmp_path, json.dumps(made, indent=1))
    rows = read_rows(path)
    assert [row.fields for row in rows] == made
    lines = path.read_text(encoding="utf-8").split("\n")
    assert all(f'"n": "{row.fields["n"]}"' in lines[row.place.line] for row in rows)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.one_of(TEXT, st.integers(-(10**12), 10**12), st.booleans(), st.none(), st.lists(TEXT, max_size=3))
OBJECTS = st.lists(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4), min_size=1, max_size=6)
# A field of a table: any text without control characters, and with quotes, delimiters and line breaks.
CELL = st.text(
    st.one_of(st.characters(exclude_categories=["Cs", "Cc"]), st.sampled_from('",;\n')), max_size=12
)
BLANK = st.lists(st.integers(0, 2), min_size=8, max_size=8)  # blank lines before each row and at the end
END = st.sampled_from(["\n", "\r\n"])


def _read(
    folder: pytest.TempPathFactory, text: str, end: str, name: str
) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a file and their lines; the text is written with the given line ends."""
    rows = read_rows(write(folder.getbasetemp(), text.replace("\n", end), name))
    return [row.fields for row in rows], [row.place.line for row in rows]


@pytest.mark.parametrize("start", ['{"version": 1,\n"data": [', '{"data": ['])
@pytest.mark.parametrize("between", [",\n", "\n,\n"])
def test_objects_at_the_start_of_a_line_do_not_make_json_lines_of_a_document(
    start: str, between: str, tmp_path: Path
) -> None:
    rows = read_rows(write(tmp_path, f'{start}\n{{"a": 1}}{between}{{"a": 2}}\n]}}'))
    assert [row.fields for row in rows] == [{"a": 1}, {"a": 2}]


def test_json_lines_with_a_broken_first_line_are_still_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": 1,\n{"a": 2}\n{"a": 3}\n')
    with pytest.raises(DataError, match=r"JSON lines need one complete object"):
        read_rows(path)


@given(OBJECTS, BLANK, END, st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_json_lines_are_read_with_their_lines(
    tmp_path_factory: pytest.TempPathFactory,
    objects: list[dict[str, Any]],
    blank: list[int],
    end: str,
    escaped: bool,
) -> None:
    text, lines = "", []
    for made, before in zip(objects, blank, strict=False):
        text += "\n" * before
        lines.append(text.count("\n") + 1)
        text += json.dumps(made, ensure_ascii=escaped) + "\n"
    assert _read(tmp_path_factory, text + "\n" * blank[-1], end, "any.jsonl") == (objects, lines)


@given(OBJECTS, BLANK, END, st.sampled_from([None, 0, 2]), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_json_list_is_read_with_its_lines(
    tmp_path_factory: pytest.TempPathFactory,
    objects: list[dict[str, Any]],
    blank: list[int],
    end: str,
    indent: int | None,
    under_data: bool,
) -> None:
    text, lines = '{"version": [1],\n"data": [' if under_data else "[", []
    for number, (made, before) in enumerate(zip(objects, blank, strict=False)):
        text += ("," if number else "") + "\n" * before
        lines.append(text.count("\n") + 1)
        text += json.dumps(made, ensure_ascii=False, indent=indent)
    text += "]}" if under_data else "]"
    assert _read(tmp_path_factory, text + "\n" * blank[-1], end, "any.json") == (objects, lines)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6), BLANK, END, st.sampled_from(",\t;"))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_table_is_read_with_its_lines(
    tmp_path_factory: pytest.TempPathFactory,
    cells: list[tuple[str, str]],
    blank: list[int],
    end: str,
    delimiter: str,
) -> None:
    out, lines = io.StringIO(), []
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    out.write("\n" * blank[-1])
    writer.writerow(("question", "answer"))
    for row, before in zip(cells, blank, strict=False):
        out.write("\n" * before)
        lines.append(out.getvalue().count("\n") + 1)
        writer.writerow(row)
    expected = [{"question": question, "answer": answer} for question, answer in cells]
    assert _read(tmp_path_factory, out.getvalue(), end, "any.csv") == (expected, lines)
