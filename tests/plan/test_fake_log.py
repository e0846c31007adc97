"""What operators take without memory, beside what torch's profiler sees the same operators allocate."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from talik.plan.fake_log import fake_world
from talik.recipe import Recipe
from talik.train.optim import OPTIMIZERS, round_stochastically_
from talik.train.scratch import MemoryScratch
from talik.train.update import prepare, update

COUNT = 50_000


def accumulates_unlike_dtypes() -> None:
    gradient = torch.zeros(COUNT)
    gradient.add_(torch.ones(COUNT, dtype=torch.bfloat16))


def multiplies_unlike_dtypes() -> Tensor:
    return torch.ones(COUNT, dtype=torch.bfloat16) * torch.ones(COUNT)


def rounds_at_random() -> None:
    round_stochastically_(torch.zeros(COUNT, dtype=torch.bfloat16), torch.ones(COUNT))


def updates_by(optimizer: str) -> Callable[[], None]:
    """The second update of one matrix, as of a run in bf16-sr."""

    def work() -> None:
        name, shape = "layers.0.weight", torch.Size([200, 256])
        recipe = Recipe.model_validate(
            {"model": "-", "data": "-", "optimizer": optimizer, "precision": "bf16-sr"}
        )
        scratch = MemoryScratch(torch.device("cpu"))
        weight = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        prepare([(name, weight)], recipe, scratch)
        scratch[f"gradient/{name}"] = torch.ones(shape)
        update(name, weight, scratch, recipe, None, 2, 0.01)

    work.__name__ = optimizer
    return work


def simulated(work: Callable[[], object], device: str) -> int:
    with fake_world(nn.Module(), device) as log:
        work()
    sizes = (log.births[event].bytes if event >= 0 else -log.births[~event].bytes for event in log.events)
    return max(accumulate(sizes))


def allocated(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # pyright: ignore[reportOptionalMemberAccess]
    sizes = (event.nbytes() for event in events if event.name() == "[memory]")  # pyright: ignore[reportAttributeAccessIssue]
    return max(accumulate(sizes))


@pytest.mark.parametrize(
    "work",
    [
        accumulates_unlike_dtypes,
        multiplies_unlike_dtypes,
        rounds_at_random,
        *(updates_by(optimizer) for optimizer in OPTIMIZERS),
    ],
    ids=lambda f: f.__name__,
)
def test_the_peak_is_the_allocators(work: Callable[[], object]) -> None:
    torch.manual_seed(0)
    assert simulated(work, "cpu") == pytest.approx(allocated(work), abs=64)


def test_a_cuda_device_converts_nothing_beforehand() -> None:
    assert (
        simulated(accumulates_unlike_dtypes, "cpu") - simulated(accumulates_unlike_dtypes, "cuda")
        == 4 * COUNT
    )
