"""Sources, shares and sets; and large data in files, which are those in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from talik.data import kept, prepare, prepared
from talik.data.dataset import Data, examples_fingerprint, read_all, read_sets
from talik.data.store import StoredExamples, lengths_of
from talik.errors import DataError
from talik.model.tokenizer_files import load_tokenizer
from talik.recipe import Recipe, check
from talik.system import home_folder


def write_rows(path: Path, count: int, name: str = "q") -> Path:
    rows = (
        {"input": f"{name} {n}?", "output": f"It is {n * n}. " * (n % 4 + 1), "id": n} for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_of(data: Any, **fields: Any) -> Recipe:
    return check({"model": "-", "data": data, **fields})


def outputs(data: Data) -> list[str]:
    return [f"{Path(e.place.file).name}:{e.place.line}" for e in data.examples]


def test_several_sources_with_shares_and_limits(tokenizer: Any, tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", 40), write_rows(tmp_path / "b.jsonl", 200, "r")
    sources = [{"path": str(a), "weight": 2.0, "limit": 10}, {"path": str(b), "weight": 0.25}]
    data = read_all(recipe_of(sources), recipe_of(sources).data, tokenizer, "reading")
    first, second = data.sources
    assert first.examples == 20 and 30 <= second.examples <= 70
    assert outputs(data)[:4] == ["a.jsonl:1", "a.jsonl:1", "a.jsonl:2", "a.jsonl:2"]
    again = read_all(recipe_of(sources), recipe_of(sources).data, tokenizer, "reading")
    assert outputs(again) == outputs(data)
    other = recipe_of(sources, seed=1)
    assert outputs(read_all(other, other.data, tokenizer, "reading")) != outputs(data)
    assert data.ranges[1][1:] == (20, len(data.examples)) and data.unread == {"id": 210}


def test_a_number_of_questions_is_held_out(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 40)
    train, held = read_sets(recipe_of(str(path), held_out=7), tokenizer)
    assert held is not None and (len(train.examples), len(held.examples)) == (33, 7)
    assert not set(outputs(train)) & set(outputs(held))


def test_bad_rows_are_refused_together_or_left_out_and_kept_with_their_reason(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", 5)
    with path.open("a") as file:
        file.write(
            '{"input": "q"}\n{"input": "q", "output": ""}\n{"input": "<|im_end|>", "output": "a"}\n{"x\n'
        )
    with pytest.raises(DataError) as caught:
        read_all(recipe_of(str(path)), str(path), tokenizer, "reading")
    message = str(caught.value)
    assert "a.jsonl:6: field 'output' is missing" in message and "a.jsonl:9: broken JSON" in message
    assert "4 rows in all" in message and "--bad-rows skip" in message
    data = read_all(recipe_of(str(path), bad_rows="skip"), str(path), tokenizer, "reading")
    assert len(data.examples) == 5 and sum(data.problems.values()) == 4
    assert [row["line"] for row in data.rejected] == [6, 7, 9, 8]
    assert data.rejected[1]["field"] == "output" and data.rejected[1]["row"] == {"input": "q", "output": ""}


def test_rows_with_media_are_left_out_where_that_is_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 5)
    with path.open("a") as file:
        file.write('{"input": "q", "output": "a", "images": ["x.png"]}\n')
    with pytest.raises(DataError, match="the row has images"):
        read_all(recipe_of(str(path)), str(path), tokenizer, "reading")
    data = read_all(recipe_of(str(path), drop_media=True), str(path), tokenizer, "reading")
    assert (len(data.examples), data.media) == (5, 1)


def test_rows_of_two_formats_in_one_file_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", 3), tmp_path / "b.jsonl"
    b.write_text('{"prompt": "q", "completion": "a"}\n{"input": "q", "output": "a"}\n')
    with pytest.raises(DataError, match=r"b.jsonl:1, 'input-output' first in .*b.jsonl:2"):
        read_all(recipe_of([str(a), str(b)]), recipe_of([str(a), str(b)]).data, tokenizer, "reading")


def test_a_document_is_split_into_consecutive_examples(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("Once upon a time. " * 40)
    data = read_all(recipe_of(str(path), max_length=50), str(path), tokenizer, "reading")
    ids = [token for example in data.examples for token in example.input_ids]
    assert ids == [*tokenizer(path.read_text()).input_ids, tokenizer.eos_token_id]
    assert data.report.pieces == len(data.examples) > 3 and data.report.documents == 1
    assert all(e.trained_tokens == e.length - 1 for e in data.examples)


# In files


@pytest.fixture
def large(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads 600 rows as if they were many: in files, by two processes; and the same in memory."""
    path = write_rows(tmp_path / "rows.jsonl", 600)
    load = partial(load_tokenizer, model_folder)
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(kept, "PART_BYTES", 8000)
    monkeypatch.setattr(kept, "cores", lambda: 1)

    def read(stored: bool = True, **fields: Any) -> Data:
        monkeypatch.setattr(prepared, "LARGE", 0 if stored else 2**40)
        recipe = recipe_of(str(path), **fields)
        return read_all(recipe, recipe.data, load(), "reading", load=load)

    return read


def test_what_is_kept_in_files_is_what_is_in_memory(large: Any) -> None:
    stored, held = large(), large(stored=False)
    assert isinstance(stored.examples, StoredExamples) and len(list(home_folder().glob("data/*/part-*"))) > 3
    assert list(stored.examples) == list(held.examples) and stored.report == held.report
    assert examples_fingerprint(stored) == examples_fingerprint(held)
    assert lengths_of(stored.examples) == [example.length for example in held.examples]
    assert stored.examples[-1] == held.examples[-1] and stored.examples[3:5] == held.examples[3:5]


def test_workers_give_the_same(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = large()
    for path in home_folder().glob("data/*/whole.json"):
        path.rename(path.with_name("part-00000x"))
    for path in home_folder().glob("data/*/*"):
        path.rename(path.with_name(f"old-{path.name}"))
    monkeypatch.setattr(kept, "cores", lambda: 2)
    assert examples_fingerprint(large()) == examples_fingerprint(alone)


def test_it_is_found_again_and_not_prepared_again(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = large()
    monkeypatch.setattr(kept, "prepare_all", lambda *_: pytest.fail("prepared again"))
    again = large()
    assert list(again.examples) == list(first.examples) and again.report == first.report
    assert again.unread == {"id": 600}
    with pytest.raises(pytest.fail.Exception):
        large(max_length=100)


def test_it_goes_on_after_the_last_whole_part(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(large().examples)
    (folder,) = home_folder().glob("data/*/")
    parts = sorted(folder.glob("part-*"))
    (folder / "whole.json").unlink()
    (parts[3] / "ids.bin").unlink()  # it may still be mapped: cut off in place it would end the process
    (parts[3] / "ids.bin").write_bytes(b"cut off")
    prepared_again: list[Any] = []
    real = kept.prepare_all

    def counted(*arguments: Any) -> Any:
        for chunk, outcome in real(*arguments):
            prepared_again.append(chunk.first)
            yield chunk, outcome

    monkeypatch.setattr(kept, "prepare_all", counted)
    assert list(large().examples) == expected
    about = [json.loads((part / "about.json").read_text()) for part in parts[:3]]
    assert min(prepared_again) > sum(one["rows"] for one in about) - 1 > 0


STARTED = """
import sys, time
from functools import partial
from talik.data import prepare
from talik.data.prepare import PrepareOptions
from talik.data.report import LabelOptions
from talik.model.tokenizer_files import load_tokenizer
from pathlib import Path
load = partial(load_tokenizer, Path(sys.argv[1]))
import multiprocessing, threading
def tell():
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
threading.Thread(target=tell, daemon=True).start()
pool = prepare.ProcessPoolExecutor(2, mp_context=prepare.get_context("spawn"),
    initializer=partial(prepare._start_worker, load, PrepareOptions(LabelOptions(), False, False, 0)))
for _ in range(4):
    pool.submit(time.sleep, 600)
time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed(model_folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, str(model_folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    workers = [psutil.Process(int(number)) for number in process.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(8)  # they load the tokenizer, and begin to watch
    process.kill()
    process.communicate()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert len(gone) == 2
