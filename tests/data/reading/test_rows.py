"""Files of rows: the rows with their lines, and the errors with place and remedy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

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
