"""What operators take without memory, beside what torch's profiler sees the same operators allocate."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from talik.plan.fake_log import fake_world
from talik.train.optim import round_stochastically_

COUNT = 50_000


def accumulates_unlike_dtypes() -> None:
    gradient = torch.zeros(COUNT)
    gradient.add_(torch.ones(COUNT, dtype=torch.bfloat16))


def multiplies_unlike_dtypes() -> Tensor:
    return torch.ones(COUNT, dtype=torch.bfloat16) * torch.ones(COUNT)


def rounds_at_random() -> None:
    round_stochastically_(torch.zeros(COUNT, dtype=torch.bfloat16), torch.ones(COUNT))


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
    "work", [accumulates_unlike_dtypes, multiplies_unlike_dtypes, rounds_at_random], ids=lambda f: f.__name__
)
def test_the_peak_is_the_allocators(work: Callable[[], object]) -> None:
    torch.manual_seed(0)
    assert simulated(work, "cpu") == pytest.approx(allocated(work), abs=64)


def test_a_cuda_device_converts_nothing_beforehand() -> None:
    assert (
        simulated(accumulates_unlike_dtypes, "cpu") - simulated(accumulates_unlike_dtypes, "cuda")
        == 4 * COUNT
    )
