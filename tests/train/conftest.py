"""A small training problem, and the same by plain PyTorch."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from talik.data.batches import collate
from talik.data.examples import Example, Span
from talik.data.rows import Place
from talik.model.chain import Chain
from talik.model.freeze import freeze
from talik.recipe import Plan, Recipe
from talik.thaw import thawed
from talik.train.loading import Loaded, load
from talik.train.loss import trained_rows
from talik.train.top import MicroBatch, Top, make_top
from talik.train.trunk import run_trunk


def make_examples(lengths: tuple[int, ...] = (9, 14, 14, 6, 11, 20), seed: int = 0) -> list[Example]:
    """Random tokens; the last half of each example is trained."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate(lengths):
        ids = array("i", torch.randint(3, 380, (length,), generator=generator).tolist())
        spans = (Span(0, length // 2, False), Span(length // 2, length, True))
        made.append(Example(ids, spans, Place("made.jsonl", number + 1)))
    return made


def make_plan(of: Top, /, **changes: Any) -> Plan:
    fields = {
        "device": "cpu",
        "threads": 1,
        "cut": of.cut,
        "layers": len(of.chain.layers),
        "trunk": "resident",
        "top": "resident",
        "cache": "disk",
        "trunk_batch_tokens": 64,
        "hidden_bytes": 1 << 30,
        "micro_batch_tokens": 40,
        "loss_chunk": 7,
        "recompute": False,
    }
    return Plan.model_validate({**fields, **changes})


def make_recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({"model": "-", "data": "-", "thaw": "top.2,norm", **changes})


def load_from(model: Any, folder: Path, *, thaw: str = "top.2,norm", **changes: Any) -> Loaded:
    """The model in files, as a run loads it: what `thaw` names is trained, the trunk streamed."""
    model.save_pretrained(folder)
    precision = "fp32" if model.dtype == torch.float32 else "bf16"
    recipe = make_recipe(precision=precision, thaw=thaw)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    plan = make_plan(top_at(Chain(model), thawed(thaw, count).cut), **{"trunk": "streamed", **changes})
    return load(recipe, plan, folder)


def top_at(chain: Chain, cut: int) -> Top:
    """A top of which only the cut matters."""
    return Top(chain, cut, {})


def freeze_top(model: Any, thaw: str = "top.2,norm") -> Top:
    trained = freeze(model, thaw)
    return make_top(Chain(model), trained)


def micro_batch(top: Top, examples: list[Example]) -> MicroBatch:
    """Padded together, each with what the trunk hands on for it alone, unpadded."""
    batch = collate(examples, pad_id=0)
    width, dtype = top.chain.width(top.cut), top.chain.handed_on(top.cut)
    hidden = torch.zeros(*batch["input_ids"].shape, width, dtype=dtype)
    for row, example in zip(hidden, examples, strict=True):
        row[: example.length] = run_trunk(top.chain, top.cut, torch.tensor([list(example.input_ids)]))[0]
    rows, targets = trained_rows(batch["labels"])
    return MicroBatch(batch["input_ids"], hidden, rows, targets)


def plain_loss(model: Any, examples: list[Example], count: int) -> torch.Tensor:
    """What everybody writes: the whole model on padded batches, cross-entropy over shifted labels."""
    batch = collate(examples, pad_id=0)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    wanted = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat = logits[:, :-1].flatten(0, 1).to(wanted)
    return F.cross_entropy(flat, batch["labels"][:, 1:].flatten(), reduction="sum") / count


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return make_examples()


@pytest.fixture(scope="session")
def top_of() -> Callable[..., Top]:
    return freeze_top
