"""Each common mistake compared with the correct loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from talik.base.errors import UsageError
from talik.diagnose.habits import HABITS, HabitReport, Side, habit
from talik.diagnose.habits_labels import LABELS
from talik.model.folder import ModelFolder

MEMORY = [name for name in HABITS if name not in LABELS]


@pytest.fixture(scope="module")
def folder(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only a config.json: a model of four layers with a vocabulary that is large for it."""
    made = tmp_path_factory.mktemp("habits")
    build_model("qwen2", vocab_size=4096).config.save_pretrained(made)
    return made


@cache
def small(name: str, folder: Path, budget: int | None = None) -> HabitReport:
    return habit(name, ModelFolder(folder), budget, top_layers=1, sequence=64)


def sides(report: HabitReport) -> tuple[Side, Side]:
    assert report.sides is not None
    return report.sides


def growth(side: Side) -> list[int]:
    """Bytes that the forward of each frozen layer except the first adds to the allocated memory."""
    alive = [side.levels[f"layer {index}"] for index in range(3)]
    return [after - before for before, after in pairwise(alive)]


def layer_bytes(model: Any) -> int:
    return sum(weight.numel() for weight in model.model.layers[0].parameters()) * 2


@pytest.mark.parametrize("name", MEMORY)
def test_every_memory_habit_takes_more_than_the_correct_loop(folder: Path, name: str) -> None:
    report = small(name, folder)
    wrong, right = sides(report)
    assert list(wrong.levels) == ["embeddings", *(f"layer {index}" for index in range(4))]
    worse = {
        "offloaded-top": wrong.learning < wrong.trained and right.learning == right.trained,
        "full-logits": wrong.logits > 1.5 * right.logits and wrong.backward_flops > right.backward_flops,
        "checkpointing": wrong.backward_flops > 1.2 * right.backward_flops and wrong.peak > right.peak,
    }
    assert worse.get(name, wrong.peak > right.peak)
    written = json.loads(json.dumps(report.as_dict()))
    assert written["habit"]["peak"] == wrong.peak and written["done_right"]["peak"] == right.peak
    assert HABITS[name].why in str(report) and "layer 3" in str(report)


def test_frozen_layers_below_trained_embeddings_fill_the_memory(folder: Path) -> None:
    wrong, right = sides(small("trainable-embeddings", folder))
    assert min(growth(wrong)) > 3 * max(growth(right))


def test_offloaded_layers_stay_where_the_embeddings_are_trained(
    folder: Path, build_model: Callable[..., Any]
) -> None:
    size = layer_bytes(build_model("qwen2"))
    wrong, right = sides(small("offloaded", folder))
    without, _ = sides(small("trainable-embeddings", folder))
    for copied, activations in zip(growth(wrong), growth(without), strict=True):
        biases = 2 * (32 + 16 + 16)  # all that a layer's backward does without
        assert copied - activations == size - biases  # on top of what the layer saves anyway
    assert max(growth(right)) < size


def test_a_budget_is_full_in_a_layer(folder: Path) -> None:
    free, _ = sides(small("offloaded", folder))
    budget = free.levels["layer 1"]
    report = small("offloaded", folder, budget)
    wrong, right = sides(report)
    assert wrong.full_at in ("forward layer 1, step 1", "forward layer 2, step 1")
    assert right.full_at not in (None, wrong.full_at) and free.full_at is None
    assert "budget full at" in str(report)


@pytest.mark.parametrize("name", LABELS)
def test_every_habit_of_labels_is_shown_and_found(model_folder: Path, name: str) -> None:
    report = habit(name, ModelFolder(model_folder))
    assert report.shown is not None
    assert [finding.habit for finding in report.shown.findings] == [name]
    right = [token for _, _, token in report.shown.tokens if token is not None]
    assert "".join(right) == "Two plus three is five.<|im_end|>"
    assert json.loads(json.dumps(report.as_dict()))["example"]["findings"][0]["habit"] == name
    assert str(report.shown.findings[0]) in str(report)


def test_names_and_folders_that_do_not_exist(folder: Path) -> None:
    with pytest.raises(UsageError, match="trainable-embeddings"):
        habit("unknown", ModelFolder(folder))
    with pytest.raises(UsageError, match="no tokenizer"):
        habit("masked-end", ModelFolder(folder))


def test_more_layers_than_can_be_trained_above_frozen_ones_are_refused(folder: Path) -> None:
    for top_layers in (0, 4):
        with pytest.raises(UsageError, match=f"and not {top_layers}\n.*between 1 and 3"):
            habit("offloaded", ModelFolder(folder), top_layers=top_layers)


def test_the_table_of_a_deep_model_stays_on_one_screen(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    build_model("qwen2", num_hidden_layers=20).config.save_pretrained(tmp_path)
    lines = str(habit("trainable-embeddings", ModelFolder(tmp_path), top_layers=1, sequence=16)).splitlines()
    assert len(lines) < 30 and sum(line.startswith("layer 19 ") for line in lines) == 1
