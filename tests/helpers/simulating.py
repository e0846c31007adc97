"""A small problem for the simulator: a model, a plan and two steps."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from talik.data.examples import Example, Span
from talik.data.reading.rows import Place
from talik.model.folder import ModelFolder
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.simulate.simulation import Subject, Workload, subject_of
from talik.training.trunk.cache import groups_of

SMALL = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 512, "head_dim": 16}


def examples(*lengths: int) -> list[Example]:
    made = []
    for length in lengths:
        spans = (Span(0, length // 2, False), Span(length // 2, length, True))
        ids = array("i", ((7 * place + length) % 300 + 3 for place in range(length)))
        made.append(Example(ids, spans, Place("made.jsonl", 1)))
    return made


def problem(
    folder: Path, precision: str, optimizer: str = "adamw", lora: str | None = None, **changes: Any
) -> tuple[Subject, Plan, Workload]:
    """A folder's model with two layers trained, a plan, and two steps."""
    of = {"model": "-", "data": "-", "top_layers": 2, "precision": precision}
    recipe = Recipe.model_validate({**of, "optimizer": optimizer, "lora": lora})
    subject = subject_of(recipe, ModelFolder(folder))
    fields: dict[str, Any] = {
        "device": "cpu",
        "threads": 1,
        "cut": len(subject.chain.layers) - 2,
        "layers": len(subject.chain.layers),
        "trunk": "streamed",
        "top": "resident",
        "cache": "disk",
        "trunk_batch_tokens": 256,
        "hidden_bytes": 1 << 30,
        "micro_batch_tokens": 256,
        "loss_chunk": 32,
        "recompute": False,
    }
    made = examples(96, 60, 60, 31)
    work = Workload(made, groups_of(made, 256), [[0, 1, 2], [3, 0]], [1, 2])
    return subject, Plan.model_validate({**fields, **changes}), work
