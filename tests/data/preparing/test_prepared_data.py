"""Sources, shares and sets. Large data, in files: test_prepare.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from talik.base.errors import DataError
from talik.data.dataset import Data, read_all, read_sets
from talik.recipe.recipe import Recipe, checked_recipe


def write_rows(path: Path, count: int, name: str = "q") -> Path:
    rows = (
        {"input": f"{name} {n}?", "output": f"It is {n * n}. " * (n % 4 + 1), "id": n} for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_of(data: Any, **fields: Any) -> Recipe:
    return checked_recipe({"model": "-", "data": data, **fields})


def outputs(data: Data) -> list[str]:
    return [f"{Path(e.place.file).name}:{e.place.line}" for e in data.examples]


def test_several_sources_with_shares_and_limits(tokenizer: Any, tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", 40), write_rows(tmp_path / "b.jsonl", 200, "r")
    sources = [{"path": str(a), "weight": 2.0, "limit": 10}, {"path": str(b), "weight": 0.25}]
    data = read_all(recipe_of(sources), recipe_of(sources).data, tokenizer, "reading")
    first, second = data.sources
    assert first.examples == 20 and 30 <= second.examples <= 70
    assert outputs(data)[:20] == 2 * [f"a.jsonl:{n}" for n in range(1, 11)]  # all, before one comes again
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
    rejected = list(map(json.loads, data.rejected))
    assert [row["line"] for row in rejected] == [6, 7, 8, 9]
    assert rejected[1]["field"] == "output" and rejected[1]["row"] == {"input": "q", "output": ""}


def test_rows_with_media_are_left_out_where_that_is_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", 5)
    with path.open("a") as file:
        file.write('{"input": "q", "output": "a", "images": ["x.png"]}\n')
    with pytest.raises(DataError, match="the row has images"):
        read_all(recipe_of(str(path)), str(path), tokenizer, "reading")
    data = read_all(recipe_of(str(path), drop_media=True), str(path), tokenizer, "reading")
    assert (len(data.examples), data.media) == (5, 1)


def test_a_document_is_split_into_consecutive_examples(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("Once upon a time. " * 40)
    data = read_all(recipe_of(str(path), max_length=50), str(path), tokenizer, "reading")
    ids = [token for example in data.examples for token in example.input_ids]
    assert ids == [*tokenizer(path.read_text()).input_ids, tokenizer.eos_token_id]
    assert data.report.pieces == len(data.examples) > 3 and data.report.documents == 1
    assert all(e.trained_tokens == e.length - 1 for e in data.examples)
