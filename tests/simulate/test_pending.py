"""Memory of pending micro-batches: allocated with the first computed inputs, freed from the top down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.simulating import SMALL, problem
from talik.data.preparing.stored_examples import lengths_of
from talik.model.freeze import trained_parameters
from talik.simulate.fake_log import FakeLog, fake_world
from talik.simulate.fakes import FakeStates
from talik.simulate.pending import Pending
from talik.training.step.top import make_top

TOKENS = 60 + 60 + 31  # of examples 1 to 3, each in a micro-batch without padding
WIDTH = SMALL["hidden_size"]


def allocated(log: FakeLog) -> int:
    return sum(change for _, change in log.changes())


@pytest.mark.parametrize("inputs", ["memory", "disk"])
@pytest.mark.parametrize("cache", ["disk", "none"])
def test_inputs_of_a_streamed_top(
    build_model: Callable[..., Any], tmp_path: Path, inputs: str, cache: str
) -> None:
    build_model("qwen2", **SMALL).config.save_pretrained(tmp_path)
    way = {"top": "streamed", "recompute": True, "inputs": inputs, "micro_batch_tokens": 60, "cache": cache}
    subject, plan, work = problem(tmp_path, "fp32", **way)
    chain, form = subject.chain, (WIDTH, subject.chain.dtype_at(plan.cut))
    top = make_top(chain, trained_parameters(chain.model), plan.cut)
    states = FakeStates(lengths_of(work.examples), *form) if cache == "disk" else None
    with fake_world(chain.model) as log:
        with Pending(top, work.examples, [1, 2, 3], states, plan) as pending:
            held = allocated(log)
            gradients, hidden = 4 * TOKENS * WIDTH, 4 * TOKENS * WIDTH if cache == "disk" else 0
            assert gradients + hidden <= held  # and the skeletons
            for layer in (plan.cut, plan.cut + 1):
                pending.allocate_inputs(layer)
                pending.allocate_inputs(layer)  # as for the next computed micro-batch
            layers = 0 if inputs == "disk" else 1 if cache == "disk" else 2  # the cached first input is held
            assert allocated(log) - held == layers * 4 * TOKENS * WIDTH
            pending.free_inputs_above(plan.cut)
            assert allocated(log) - held == (layers == 2) * 4 * TOKENS * WIDTH
            pending.free_inputs_above(plan.cut - 1)
            assert allocated(log) == held
        assert allocated(log) < gradients


def test_a_resident_top_has_only_the_micro_batches(build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model("qwen2", **SMALL).config.save_pretrained(tmp_path)
    subject, plan, work = problem(tmp_path, "fp32", micro_batch_tokens=60)
    top = make_top(subject.chain, trained_parameters(subject.chain.model), plan.cut)
    states = FakeStates(lengths_of(work.examples), WIDTH, subject.chain.dtype_at(plan.cut))
    with (
        fake_world(subject.chain.model) as log,
        Pending(top, work.examples, [1, 2, 3], states, plan) as pending,
    ):
        held = allocated(log)
        assert held >= 4 * TOKENS * WIDTH
        pending.allocate_inputs(plan.cut + 1)
        assert allocated(log) == held
