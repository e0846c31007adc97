"""Preparation gives equal examples in memory and in files, by any number of processes, interrupted or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from talik.base.errors import DataError, TalikError
from talik.data.dataset import Data, examples_fingerprint, keep_facts, read_all, read_sets
from talik.data.preparing import cache, prepare, prepared_data
from talik.data.preparing.cache_folders import data_root
from talik.data.preparing.workers import Worker
from talik.data.reading.streams import as_file
from talik.model.tokenizer import load_tokenizer
from talik.recipe.recipe import checked_recipe

COUNT = 600
BAD = {50: "{", 51: '{"input": "q"}', 400: "{"}


def line(number: int) -> str:
    return json.dumps({"input": f"question {number % 500}", "output": f"answer {number}", "id": number})


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    made = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(BAD.get(n, line(n)) + "\n" for n in range(COUNT)), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats every file as large, with many small chunks and parts, and prepares in this process."""
    monkeypatch.setattr(prepared_data, "LARGE", 0)
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(cache, "PART_BYTES", 8000)
    monkeypatch.setattr(cache, "worker_count", lambda: 1)


def read(rows: Any, folder: Path, said: list[str] | None = None, **options: Any) -> Data:
    """The data, prepared in files."""
    recipe = checked_recipe({"model": "-", "data": rows, "bad_rows": "skip", **options})
    load = partial(load_tokenizer, folder)

    def notify(event: Any) -> None:
        if said is not None:
            said.append(event.text)

    return read_all(recipe, recipe.data, load(), "training", load=load, notify=notify)


def in_memory(rows: Any, folder: Path, **options: Any) -> Data:
    recipe = checked_recipe({"model": "-", "data": rows, "bad_rows": "skip", **options})
    return read_all(recipe, recipe.data, load_tokenizer(folder), "training")


def assert_same(one: Data, other: Data) -> None:
    assert list(one.examples) == list(other.examples)
    assert examples_fingerprint(one) == examples_fingerprint(other)
    assert list(map(json.loads, one.rejected)) == list(map(json.loads, other.rejected))
    assert (one.report, one.sources, one.problems, one.unread) == (
        other.report,
        other.sources,
        other.problems,
        other.unread,
    )


def parts() -> list[Path]:
    return sorted(data_root().glob("*/part-*.bin"))


@pytest.mark.parametrize("workers", [1, 2])
def test_files_and_processes_change_nothing(
    workers: int, rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "worker_count", lambda: workers)
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 20_000)
    found, expected = read(str(rows), folder), in_memory(str(rows), folder)
    assert_same(found, expected)
    assert found.report.rows == COUNT - len(BAD) and found.unread == {"id": COUNT - len(BAD)}
    assert found.problems == {"broken JSON": 2, "missing field": 1}
    rejected = list(map(json.loads, found.rejected))
    assert [row["line"] for row in rejected] == [51, 52, 401]
    assert rejected[1]["row"] == {"input": "q"} and "output" in rejected[1]["problem"]
    assert parts() and not list(data_root().glob("*/.part-*"))


def forbidden(*_: Any) -> Iterator[Any]:
    raise AssertionError("prepared once more")


def test_what_is_prepared_is_found_again(rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, said = read(str(rows), folder), list[str]()
    monkeypatch.setattr(cache, "prepare_all", forbidden)
    assert_same(read(str(rows), folder, said), first)
    assert any("prepared before: 600 rows" in line for line in said)
    monkeypatch.chdir(rows.parent)
    relative = read("rows.jsonl", folder)  # the same file, by another name
    assert relative.examples[0].place.file == "rows.jsonl"
    assert examples_fingerprint(relative) == examples_fingerprint(first)
    with pytest.raises(DataError, match=r"rows\.jsonl:51: broken JSON[\s\S]*3 rows in all"):
        read("rows.jsonl", folder, bad_rows="refuse")


@pytest.mark.parametrize("options", [{"seed": 1}, {"max_length": 39}, {"train_on": "all"}, {"limit": 9}])
def test_other_options_are_prepared_anew(options: dict[str, Any], rows: Path, folder: Path) -> None:
    read(str(rows), folder)
    limit = options.pop("limit", None)
    source = {"path": str(rows)} | ({"limit": limit} if limit else {})
    assert_same(read([source], folder, **options), in_memory([source], folder, **options))
    assert len(list(data_root().glob("*/whole.json"))) == 2


class Stopped(Exception):
    pass


def test_a_start_that_was_broken_off_goes_on(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    def some(work: Iterator[Any], *how: Any) -> Iterator[Any]:
        for number, (chunk, outcome) in enumerate(prepare.prepare_all(work, *how)):
            if number == 7 and not done:
                raise Stopped
            yield chunk, outcome
            if done:
                done.append(chunk.first)

    monkeypatch.setattr(cache, "prepare_all", some)
    with pytest.raises(Stopped):
        read(str(rows), folder)
    assert parts() and not list(data_root().glob("*/whole.json"))
    (parts()[0].parent / ".part-00099.bin.x").write_bytes(b"left by a kill")
    done.append(0)
    said: list[str] = []
    assert_same(read(str(rows), folder, said), in_memory(str(rows), folder))
    assert any("continues after" in line for line in said)
    of = prepare.InputFile(as_file(rows), 0, 0, "messages", prepare.RowOptions())
    assert len(done) - 1 == len(list(prepare.chunks(of))) - 7
    assert not list(data_root().glob("*/.part-*"))


@pytest.mark.parametrize(
    "damage", ["bit", "missing in the middle", "missing at the end", "half a table", "half a mark"]
)
def test_damaged_files_are_prepared_again(damage: str, rows: Path, folder: Path) -> None:
    read(str(rows), folder)
    files = parts()
    assert len(files) > 3
    if damage == "bit":
        raw = bytearray(files[1].read_bytes())
        raw[40] ^= 4
        files[1].write_bytes(raw)
    elif damage == "half a table":
        files[1].with_suffix(".json").write_text('{"size": 3')
    elif damage == "half a mark":
        (files[0].parent / "whole.json").write_text('{"par')
    else:
        gone = files[1 if "middle" in damage else -1]
        gone.unlink()
        gone.with_suffix(".json").unlink()
    said: list[str] = []
    assert_same(read(str(rows), folder, said), in_memory(str(rows), folder))
    assert not any("prepared before" in line for line in said)
    if damage in ("bit", "half a table"):
        assert any("part-00001" in line and "prepared again" in line for line in said)


def test_files_of_changed_rows_are_removed(rows: Path, folder: Path) -> None:
    read(str(rows), folder)
    stranger = data_root() / ("0" * 32)
    stranger.mkdir()
    (stranger / "data.json").write_text(json.dumps({"facts": {}, "files": [[str(rows), 1, 1]]}))
    with rows.open("a", encoding="utf-8") as file:
        file.write(line(9999) + "\n")
    said: list[str] = []
    assert_same(read(str(rows), folder, said), in_memory(str(rows), folder))
    assert any("have changed" in line for line in said)
    assert len(list(data_root().glob("*/whole.json"))) == 1 and stranger.is_dir()


def test_rejected_rows_are_kept_with_the_run(rows: Path, folder: Path, tmp_path: Path) -> None:
    keep_facts(tmp_path, read(str(rows), folder), None)
    kept_rows = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["line"] for row in kept_rows] == [51, 52, 401]
    clean = tmp_path / "clean.jsonl"
    clean.write_text(line(1) + "\n" + line(2), encoding="utf-8")
    (tmp_path / "run").mkdir()
    keep_facts(tmp_path / "run", read(str(clean), folder))
    assert not (tmp_path / "run" / "rejected.jsonl").exists()


def test_rows_with_media_are_left_out_or_refused(rows: Path, folder: Path) -> None:
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"input": "q", "output": "a", "images": ["x.png"]}) + "\n")
    found = read(str(rows), folder, drop_media=True)
    assert found.media == 1 and "media" not in found.problems
    assert read(str(rows), folder).problems["media"] == 1


def test_a_worker_that_dies_is_an_error_in_words(rows: Path, folder: Path) -> None:
    worker = Worker(partial(os._exit, 3), None)
    with pytest.raises(TalikError, match=r"has ended with exit code 3[\s\S]*continues"):
        worker.prepare(None)
    worker.end()


def test_an_error_in_a_worker_is_the_one_that_there_would_be_here(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.write_bytes(rows.read_bytes() + '{"input": "é", "output": "è"}\n'.encode("latin-1"))
    monkeypatch.setattr(cache, "worker_count", lambda: 2)
    with pytest.raises(DataError, match=r"rows\.jsonl:601: .*not UTF-8"):
        read(str(rows), folder)


KILLED = """
import sys
from functools import partial
from pathlib import Path
from talik.data.preparing import cache, prepare, prepared_data
from talik.data.dataset import read_all
from talik.model.tokenizer import load_tokenizer
from talik.recipe.recipe import checked_recipe

prepared_data.LARGE, prepare.CHUNK_BYTES, cache.worker_count = 0, 500, lambda: 2
recipe = checked_recipe({"model": "-", "data": sys.argv[2], "bad_rows": "skip"})
load = partial(load_tokenizer, Path(sys.argv[1]))
cache.PreparationProgress.__call__ = lambda *_: input()  # after the first chunk it waits
read_all(recipe, recipe.data, load(), "training", load=load)
"""


def test_workers_end_with_a_parent_that_is_killed(rows: Path, folder: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(folder), str(rows)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    children: list[psutil.Process] = []
    limit = time.monotonic() + 60
    while len(children) < 2 and process.poll() is None and time.monotonic() < limit:
        children = psutil.Process(process.pid).children()
        time.sleep(0.05)
    assert len(children) == 2
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=30)[1]


# Sources


def saved(path: Path, name: str, count: int) -> str:
    texts = [json.dumps({"input": f"{name} {n}", "output": f"answer {n}"}) for n in range(count)]
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


def lines(data: Data, file: str) -> list[int]:
    return [e.place.line for e in data.examples if e.place.file == file]


def test_weights_and_limits_of_sources(folder: Path, tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one.jsonl", "one", 200), saved(tmp_path / "two.jsonl", "two", 40)
    sources = [{"path": one, "weight": 0.3}, {"path": two, "weight": 2.5, "limit": 20}]
    found = in_memory(sources, folder)
    few, many = lines(found, one), lines(found, two)
    assert 40 <= len(few) <= 80 and few == sorted(set(few))
    assert many[:40] == [*range(1, 21), *range(1, 21)]  # all of them before one comes again
    assert 3 <= len(many[40:]) <= 17 and set(many) == set(range(1, 21))
    assert [(s.path, s.examples) for s in found.sources] == [(one, len(few)), (two, len(many))]
    assert sum(s.trained_tokens for s in found.sources) == found.report.trained_tokens
    assert found.report.rows == len(few) + 20
    assert lines(in_memory(sources, folder, seed=1), one) != few


def test_a_file_may_be_named_twice(folder: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "rows.jsonl", "row", 9)
    found = in_memory([{"path": path, "limit": 2}, {"path": path, "weight": 2}], folder)
    assert lines(found, path) == [1, 2, *range(1, 10), *range(1, 10)]
    assert [(source.path, source.examples) for source in found.sources] == [(path, 2), (f"{path} (2)", 18)]


def test_rows_that_stand_in_one_line_are_told_apart(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"input": f"q {n}", "output": "a"} for n in range(1200)]), encoding="utf-8")
    recipe = checked_recipe({"model": "-", "data": str(path), "held_out": 0.25})
    train, held = read_sets(recipe, load_tokenizer(folder))
    assert held and 200 <= len(held.examples) <= 400 and len(train.examples) + len(held.examples) == 1200
    assert (train.report.rows, held.report.rows) == (len(train.examples), len(held.examples))
    drawn = in_memory([{"path": str(path), "weight": 0.5}], folder)
    assert 500 <= len(drawn.examples) == drawn.report.rows <= 700


def test_held_out_questions_of_several_sources(folder: Path, tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one.jsonl", "same", 60), saved(tmp_path / "two.jsonl", "same", 80)
    recipe = checked_recipe({"model": "-", "data": [one, two], "held_out": 10})
    train, held = read_sets(recipe, load_tokenizer(folder))
    assert held is not None
    questions = {*lines(held, one), *lines(held, two)}
    assert len(questions) == 10  # a line is a question, the same one in both files
    assert not questions & {*lines(train, one), *lines(train, two)}
    assert [name for name, _, _ in held.ranges] == [one, two]


def test_a_row_of_another_format_is_never_dropped_in_silence(folder: Path, tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one.jsonl", "one", 3), tmp_path / "two.jsonl"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    two.write_text(json.dumps(row) + "\n" + line(1), encoding="utf-8")
    with pytest.raises(DataError, match=r"two\.jsonl:2: the row has the format 'input-output'"):
        in_memory([one, str(two)], folder, bad_rows="refuse")
    assert in_memory([one, str(two)], folder).problems == {"another format": 1}
