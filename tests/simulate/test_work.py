"""The part of a run that is simulated has the same peaks as the whole run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.simulating import SMALL, examples, problem
from talik.data.examples import Span
from talik.model.folder import ModelFolder
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.simulate.simulation import Subject, Workload, simulate, subject_of
from talik.simulate.work import workload_of
from talik.training.trunk.cache import groups_of

LENGTHS = (30, 31, 31, 32, 60, 61, 62, 64, 100)  # the largest micro-batch is neither the first nor the last


@pytest.fixture
def subject(build_model: Callable[..., Any], tmp_path: Path) -> Subject:
    build_model("qwen2", **SMALL).save_pretrained(tmp_path)
    recipe = Recipe.model_validate(
        {"model": "-", "data": "-", "thaw": "top.2,norm,head", "precision": "fp32"}
    )
    return subject_of(recipe, ModelFolder(tmp_path))


def peaks(subject: Subject, plan: Plan, work: Workload) -> dict[str, int]:
    return {peak.phase: peak.bytes for peak in simulate(subject, plan, work).phases}


def test_two_micro_batches_stand_for_a_step_of_more(subject: Subject, tmp_path: Path) -> None:
    _, plan, _ = problem(tmp_path, "fp32", loss_chunk=16)
    recipe = subject.recipe.model_copy(update={"batch_tokens": sum(LENGTHS), "epochs": 1})
    made = examples(*LENGTHS)
    whole = Workload(made, groups_of(made, plan.trunk_batch_tokens)[-2:], [range(len(made))] * 2)
    short = workload_of(made, [], plan, recipe, subject.chain)
    assert max(map(len, short.steps)) < len(made)
    expected = peaks(subject, plan, whole)
    for phase, size in peaks(subject, plan, short).items():
        assert size == pytest.approx(expected[phase], abs=8192), phase


def test_the_steps_of_every_epoch_are_looked_at(subject: Subject, tmp_path: Path) -> None:
    _, plan, _ = problem(tmp_path, "fp32")
    made = examples(*range(20, 52))

    def largest(**fields: int) -> int:
        recipe = subject.recipe.model_copy(update={"batch_tokens": 100, **fields})
        steps = workload_of(made, [], plan, recipe, subject.chain).steps
        return max(len(step) * max(made[i].length for i in step) for step in steps)

    assert largest(steps=1) < largest(epochs=20) == largest(epochs=1, steps=20 * 12)


def test_the_loss_that_takes_most_is_looked_at(subject: Subject, tmp_path: Path) -> None:
    """Also if it belongs to another micro-batch than the largest: only the first is trained completely."""
    _, plan, _ = problem(tmp_path, "fp32", loss_chunk=64, micro_batch_tokens=100)
    recipe = subject.recipe.model_copy(update={"batch_tokens": 100, "epochs": 1})
    long = [replace(e, spans=(Span(0, 99, False), Span(99, 100, True))) for e in examples(100, 100)]
    full = replace(examples(60)[0], spans=(Span(0, 1, False), Span(1, 60, True)))
    work = workload_of([full, *long], [], plan, recipe, subject.chain)
    assert work.steps == [[1], [0]]
    one = peaks(subject, plan, replace(work, steps=work.steps[:1]))
    both = peaks(subject, plan, work)
    assert both["loss"] > one["loss"] and both["forward"] == one["forward"]
    assert len(workload_of(long, [], plan, recipe, subject.chain).steps) == 1


def test_a_step_takes_as_much_a_second_time(subject: Subject, tmp_path: Path) -> None:
    """Up to two scalars, so equal steps are simulated once."""
    for way in ({}, {"top": "streamed", "recompute": True}):
        _, plan, work = problem(tmp_path, "fp32", **way)
        one, two = (peaks(subject, plan, replace(work, steps=[[0, 1, 2]] * times)) for times in (1, 2))
        assert two == pytest.approx(one, abs=8)


def test_fewer_tokens_that_are_all_trained_may_take_more(subject: Subject, tmp_path: Path) -> None:
    """The MLP of the last layer keeps activations of trained positions only."""
    _, plan, _ = problem(tmp_path, "fp32", loss_chunk=16, micro_batch_tokens=100)
    recipe = subject.recipe.model_copy(update={"batch_tokens": 100, "epochs": 1})
    hardly, wholly = (Span(0, 80, False), Span(80, 100, True)), (Span(0, 1, False), Span(1, 96, True))
    made = [replace(examples(length)[0], spans=spans) for length, spans in ((100, hardly), (96, wholly))]
    every = Workload(made, groups_of(made, plan.trunk_batch_tokens)[-2:], [[1], [0]])
    expected = peaks(subject, plan, every)
    assert expected["backward"] > peaks(subject, plan, replace(every, steps=[[0], [0]]))["backward"]
    found = peaks(subject, plan, workload_of(made, [], plan, recipe, subject.chain))
    assert found["backward"] == expected["backward"]
