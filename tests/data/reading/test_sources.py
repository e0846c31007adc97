"""Sources of rows: every kind of file and of argument, and the errors for all others."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from talik.base.errors import DataError
from talik.data.reading import streams
from talik.data.reading.file_rows import read_rows, rows_of
from talik.data.reading.rows import Place, Problem, describe
from talik.data.reading.sources import check_data, file_state, find_data
from talik.data.reading.streams import DataFile, TextStream

ROWS = [{"input": f"q {n}", "output": f"a {n}"} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKED = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "zst": lambda raw: zstandard.ZstdCompressor().compress(raw),
}


def saved(path: Path, raw: bytes = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows"])
def test_compressed_files_are_read_as_they_are(kind: str, name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / f"{name}.{kind}", PACKED[kind](LINES))
    rows = read_rows(path)
    assert [row.fields for row in rows] == ROWS and rows[4].place == Place(str(path), 5)


@pytest.mark.parametrize("kind", PACKED)
def test_a_broken_compressed_file_is_named(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.jsonl", PACKED[kind](LINES * 1000)[:-30])
    with pytest.raises(DataError, match=r"rows\.jsonl: the file cannot be read"):
        list(rows_of(path))


def test_parquet_and_arrow_have_row_numbers(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "q", "name": None}]] * 3
    table = pa.table({"messages": turns, "n": [1, None, 3]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with (
        pa.OSFile(str(tmp_path / "saved.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow", "saved.arrow"):
        rows = read_rows(tmp_path / name)
        assert [row.fields for row in rows] == table.to_pylist()
        assert str(rows[2].place) == f"{tmp_path / name}: row 3"


@pytest.mark.parametrize(
    "start", [b"PAR1 and nothing", b"ARROW1 and nothing", b"\xff\xff\xff\xff and nothing"]
)
def test_a_damaged_table_is_named(start: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the (Parquet|Arrow) file cannot be read"):
        read_rows(saved(tmp_path / "rows", start))


def test_plain_text_is_one_row(tmp_path: Path) -> None:
    for name, text in (
        ("a.txt", "Hello, world.\nAnd, more.\n"),
        ("b.md", "# Title\n\n{not json}\n"),
        ("c.txt", "[1] A note.\n"),
    ):
        (row,) = read_rows(saved(tmp_path / name, text.encode()))
        assert row.fields == {"text": text}


FOREIGN = [
    (bz2.compress(LINES), "a bzip2 file", "bunzip2"),
    (b"PK\x03\x04...", "an Excel or zip file", "CSV"),
    (b"%PDF-1.7", "a PDF file", "text"),
    (b"\x80\x04\x95", "a pickle", "JSON lines"),
    (b"SQLite format 3\x00", "an SQLite database", "CSV"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer", "git lfs pull"),
    (b"<!DOCTYPE html><html>404</html>", "an HTML page", "again"),
    ("[{}]".encode("utf-16"), "looks like UTF-16", "iconv -f UTF-16LE"),
    ("[{}]".encode("utf-16-be"), "looks like UTF-16", "iconv -f UTF-16BE"),
    (
        '{"input": "Wer fährt Ski?", "output": "Ada fährt schön."}\n'.encode("cp1252"),
        "looks like Windows-1252",
        "iconv -f windows-1252",
    ),
    (
        '{"input": "你好世界", "output": "你好，这是一个回答。"}\n'.encode("gb18030"),
        "looks like GB18030 (GBK)",
        "iconv -f GB18030",
    ),
    (
        '{"input": "これは何ですか", "output": "これはペンです"}\n'.encode("shift_jis"),
        "looks like Shift_JIS",
        "iconv -f Shift_JIS",
    ),
    (
        '{"input": "Что это такое?", "output": "Это ручка на столе"}\n'.encode("cp1251"),
        "looks like Windows-1251",
        "iconv -f windows-1251",
    ),
    (
        '{"input": "你好世界嗎", "output": "這是一個很長的回答"}\n'.encode("big5"),
        "looks like Big5",
        "iconv -f Big5",
    ),
]


@pytest.mark.parametrize(("raw", "looks", "remedy"), FOREIGN)
def test_files_that_are_something_else_are_named(raw: bytes, looks: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(rows_of(saved(tmp_path / "rows.jsonl", raw)))
    assert looks in str(caught.value) and remedy in str(caught.value)


HARD = [
    ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
    ('{"a": {"b": 1, "b": 2}, "c": "x\\": y"}', "the key 'b' is given twice"),
    ('{"a" : [{"b":1,"b" :2}]}', "the key 'b' is given twice"),
    ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    ('{"a": ' + "1" * 5000 + "}", "a number has too many digits"),
    ('{"a": NaN}', "NaN is not valid JSON"),
    ('{"a": 1} {"b": 2}', "Extra data"),
]


@pytest.mark.parametrize(("line", "said"), HARD)
def test_a_line_that_cannot_be_read_does_not_end_the_reading(line: str, said: str, tmp_path: Path) -> None:
    good = '{"a": "x\\": y", "b": "\\"c\\":"}'
    path = saved(tmp_path / "rows.jsonl", "\n".join([good, line, good]).encode())
    first, problem, last = rows_of(path)
    assert isinstance(problem, Problem) and said in problem.text and problem.place.line == 2
    assert not isinstance(first, Problem) and not isinstance(last, Problem)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        read_rows(path)
    with pytest.raises(DataError) as caught:
        read_rows(saved(tmp_path / "rows.json", f"[{good},\n{line}]".encode()))
    assert "rows.json:2: " in str(caught.value)


def test_a_row_that_is_too_long_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LONGEST_ROW", 1000)
    monkeypatch.setattr(streams, "_READ", 100)
    path = saved(tmp_path / "rows.jsonl", LINES + b'{"a": "' + b"x" * 5000 + b'"}\n' + LINES)
    stream = TextStream(DataFile(path, "rows", "rows"))
    found = list(stream.lines())
    assert found[5] == (6, None) and len([line for _, line in found if line]) == 10
    assert [number for number, line in found if line == json.dumps(ROWS[4])] == [5, 11]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_blocks_are_whole_lines_whatever_their_size(end: str, size: int, tmp_path: Path) -> None:
    text = f"one{end}{end}three and a half{end}four"
    path = saved(tmp_path / "text", text.encode())
    blocks = list(TextStream(DataFile(path, "text", "text")).blocks(size))
    whole = b"".join(block for _, block in blocks)
    assert whole == text.replace(end, "\n").encode()
    before = b""
    for number, block in blocks:
        assert number == before.count(b"\n") + 1 and (block.endswith(b"\n") or block == blocks[-1][1])
        before += block


def test_a_hundred_thousand_columns_are_read_quickly(tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.csv", ",".join(f"c{n}" for n in range(100_000)).encode() + b"\n")
    with pytest.raises(DataError, match="has no rows"):
        read_rows(path)


# Arguments


def test_folders_and_globs(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "a/c.csv",
        ".hidden/x.jsonl",
        "README.md",
        "dataset_info.json",
        "notes.txt",
        "z.py",
    ):
        saved(tmp_path / name)
    said: list[str] = []
    files = find_data(str(tmp_path), said.append)
    assert [file.path.name for file in files] == ["c.csv", "b.jsonl"]
    assert "not read: " in said[0] and "notes.txt" in said[0]
    assert [f.path.name for f in find_data(str(tmp_path / "*.jsonl"))] == ["b.jsonl"]
    assert [f.path.name for f in find_data(str(tmp_path / "**" / "*.csv"))] == ["c.csv"]
    assert file_state(files[0]) != file_state(files[1])


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    made = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in ("test", "train")})
    made.save_to_disk(str(tmp_path / "saved"))
    said: list[str] = []
    (file,) = find_data(str(tmp_path / "saved"), said.append)
    assert [row.fields for row in read_rows(file)] == ROWS
    assert "the split 'train' is read" in said[0] and "test" in said[0]
    (other,) = find_data(str(tmp_path / "saved" / "test"))
    assert other.path.parent.name == "test"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("rowz.jsonl", r"there is no such file\n  In .* there is: rows.jsonl"),
        ("*.parquet", "no file matches"),
        ("empty", "this folder has no data files"),
        ("hf:", "this is not the name of a data set"),
        ("hf:only-a-name", "this is not the name of a data set"),
        ("modelscope:a/b:c:d:e", "this is not the name of a data set"),
        ("x" * 5000, "cannot be used"),
        ("a\0b", "cannot be used"),
    ],
)
def test_arguments_that_name_nothing(
    data: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "rows.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=said):
        check_data(data)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match=r"a pipe or a device(.|\n)*standard input"):
            check_data(str(path))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES)))
    (file,) = find_data("-")
    rows = read_rows(file)
    assert [row.fields for row in rows] == ROWS and str(rows[1].place) == "-:2"


def test_a_hubs_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub: the library's own loader on local files, by the name that was asked for."""
    import datasets

    files = {name: str(saved(tmp_path / f"{name}.jsonl")) for name in ("train", "test")}
    load = datasets.load_dataset

    def local(name: str, config: str | None = None) -> Any:
        assert name == "org/name"
        if config not in (None, "small"):
            raise ValueError(f"BuilderConfig {config!r} not found. Available: ['small']")
        return load("json", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    said: list[str] = []
    (file,) = find_data("hf:org/name", said.append)
    assert [row.fields for row in read_rows(file)] == ROWS
    assert str(read_rows(file)[0].place).startswith("hf:org/name/") and "the split 'train' is read" in said[0]
    assert find_data("hf:org/name:test")[0].path != file.path
    assert find_data("hf:org/name:small:train")[0].path == file.path
    with pytest.raises(DataError, match=r"has no split 'dev'; its splits are train, test"):
        find_data("hf:org/name:small:dev")
    with pytest.raises(DataError, match=r"Available: \['small'\]"):
        find_data("hf:org/name:large:train")


def test_a_data_set_of_modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import modelscope

    saved(tmp_path / "data" / "train.jsonl")
    saved(tmp_path / "data" / "test.jsonl")
    monkeypatch.setattr(modelscope, "dataset_snapshot_download", lambda name: str(tmp_path))
    assert [f.name for f in find_data("modelscope:org/name:test")] == [
        "modelscope:org/name:test/data/test.jsonl"
    ]
    assert len(find_data("modelscope:org/name")) == 2


def test_values_are_shown_without_steering_a_terminal() -> None:
    assert describe("\x1b[31mred\u202e") == 'a string ("\\u001b[31mred\\u202e")'
    assert len(describe(["x" * 10**6] * 3)) < 100 and describe(b"x") == "a bytes (b'x')"
