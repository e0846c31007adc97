"""`talik convert` writes messages that give the same conversations again, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.made_rows import ask, turns
from talik.cli.main import main
from talik.data.formats.formats import conversations
from talik.data.reading.file_rows import read_rows


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def test_bad_rows_are_refused_or_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = tmp_path / "rows.csv", tmp_path / "out.jsonl"
    rows.write_text("question,answer\nq1,a1\nq2,\nq3,a3\n")
    assert run(rows, out) == 2 and list(tmp_path.iterdir()) == [rows], "nothing is left behind"
    assert "rows.csv:3: field 'answer' is empty" in capsys.readouterr().err
    assert run(rows, out, "--bad-rows", "skip") == 0
    assert "2 rows; 1 row cannot be used and is left out" in capsys.readouterr().out
    assert [row.fields for row in read_rows(out)] == [turns("q1", "a1"), turns("q3", "a3")]


def test_a_file_that_is_read_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(turns("q", "a")))
    (tmp_path / "link.jsonl").symlink_to(rows)
    for out in (rows, tmp_path / "link.jsonl"):
        assert run(rows, out) == 2 and "one of the files that are read" in capsys.readouterr().err
    assert rows.read_text() == json.dumps(turns("q", "a"))


def test_what_was_written_is_read_as_the_same_conversations(tmp_path: Path) -> None:
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    row = {
        "messages": [
            ask("system", "Kurz, bitte. 短一点"),
            ask("user", "q"),
            ask("assistant", "", tool_calls=[call], reasoning_content="Hm."),
            ask("tool", "5", name="f", tool_call_id="c1"),
            ask("assistant", "It is 5.", weight=0),
            ask("user", "And now?"),
            ask("assistant", "a\u2028b\n\u00e9"),
        ],
        "tools": [tool],
    }
    rows, once, twice = (tmp_path / f"{name}.jsonl" for name in ("rows", "once", "twice"))
    rows.write_text(json.dumps(row))
    assert run(rows, once) == 0 and run(once, twice) == 0 and once.read_bytes() == twice.read_bytes()
    (first,), (second,) = (conversations(read_rows(path))[1] for path in (rows, once))
    assert (first.messages, first.tools) == (second.messages, second.tools)  # pyright: ignore


def test_documents_stay_rows_of_text_and_sources_are_joined(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "a.txt").write_text("A text.\nOf two lines.")
    (tmp_path / "b.jsonl").write_text('{"text": "Another."}\n')
    assert run(tmp_path / "a.txt", tmp_path / "b.jsonl", out) == 0
    assert [row.fields["text"] for row in read_rows(out)] == ["A text.\nOf two lines.", "Another."]
