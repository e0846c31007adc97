"""Memory of operators on fake tensors compared with the allocations that torch's profiler records."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from talik.kernels.bf16_matmul import mm
from talik.kernels.cross_entropy import accumulate_, cross_entropy
from talik.recipe.recipe import Recipe
from talik.simulate.fake_log import fake_world
from talik.training.memory.keys import gradient
from talik.training.memory.scratch import MemoryScratch
from talik.training.step import optim as optim_module
from talik.training.step import update as update_module
from talik.training.step.optim import OPTIMIZERS, optimizer_of, round_stochastically_
from talik.training.step.update import prepare, update

COUNT = 50_000


def accumulates_unlike_dtypes() -> None:
    gradient = torch.zeros(COUNT)
    gradient.add_(torch.ones(COUNT, dtype=torch.bfloat16))


def accumulates_in_slices() -> None:
    accumulate_(torch.zeros(3 * COUNT), torch.ones(3 * COUNT, dtype=torch.bfloat16))


def makes_a_loss() -> None:
    logits = torch.ones(60, COUNT, dtype=torch.bfloat16)
    cross_entropy(logits, torch.arange(60), 60, torch.empty_like(logits))


def multiplies_bf16_in_fp32() -> None:
    wide, narrow = (torch.ones(rows, 900, dtype=torch.bfloat16) for rows in (3000, 50))
    for one, other in ((narrow, wide.T), (wide, narrow.T), (wide.T, wide), (narrow, wide[:900])):
        mm(one, other)


def multiplies_by_experts() -> None:
    rows, experts = torch.ones(900, 300, dtype=torch.bfloat16), torch.ones(3, 300, 70, dtype=torch.bfloat16)
    ends = torch.arange(3).square() * 225  # 0, 225 and 900: integers that were computed are real
    out = torch.ops.talik.grouped_mm(rows, experts, ends)
    torch.ops.talik.grouped_mm(rows.T, out, ends)


def multiplies_unlike_dtypes() -> Tensor:
    return torch.ones(COUNT, dtype=torch.bfloat16) * torch.ones(COUNT)


def rounds_at_random() -> None:
    round_stochastically_(torch.zeros(COUNT, dtype=torch.bfloat16), torch.ones(COUNT))


def updates_by(optimizer: str, rows: int = 200) -> Callable[[], None]:
    """The second update of one matrix in bf16-sr."""

    def work() -> None:
        name, shape = "layers.0.weight", torch.Size([rows, 256])
        recipe = Recipe.model_validate(
            {"model": "-", "data": "-", "optimizer": optimizer, "precision": "bf16-sr"}
        )
        scratch = MemoryScratch(torch.device("cpu"))
        weight = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        prepare([(name, weight)], recipe, scratch)
        scratch[gradient(name)] = torch.ones(shape)
        update(name, weight, scratch, recipe, scale=None, step=2, learning_rate=0.01)

    work.__name__ = optimizer
    return work


def test_a_causal_kernel_computes_half() -> None:
    query = torch.ones(1, 2, 64, 16, requires_grad=True)
    counts = []
    for causal in (False, True):
        with fake_world(nn.Module()) as log:
            nn.functional.scaled_dot_product_attention(query, query, query, is_causal=causal).sum().backward()
        counts.append(log.flops.total())
    assert counts[0] == 7 * 2 * 2 * 64 * 64 * 16  # two products, and five in the backward
    assert counts == [counts[0], counts[0] // 2]
    with fake_world(nn.Module()) as log, torch.inference_mode():
        nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert log.flops.total() == counts[1] * 2 // 7


def simulated(work: Callable[[], object], device: str) -> int:
    with fake_world(nn.Module(), device) as log:
        work()
    return max(itertools.accumulate(change for _, change in log.changes()))


def allocated(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # pyright: ignore[reportOptionalMemberAccess]
    sizes = (event.nbytes() for event in events if event.name() == "[memory]")  # pyright: ignore[reportAttributeAccessIssue]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize(
    "work",
    [
        accumulates_unlike_dtypes,
        accumulates_in_slices,
        multiplies_bf16_in_fp32,
        multiplies_by_experts,
        multiplies_unlike_dtypes,
        rounds_at_random,
        *(updates_by(optimizer) for optimizer in OPTIMIZERS),
    ],
    ids=lambda f: f.__name__,
)
def test_the_peak_is_the_allocators(work: Callable[[], object]) -> None:
    torch.manual_seed(0)
    assert simulated(work, "cpu") == pytest.approx(allocated(work), abs=64)


def test_a_loss_in_pieces_takes_its_two_pieces() -> None:
    assert simulated(makes_a_loss, "cpu") == pytest.approx(allocated(makes_a_loss), abs=512)


def test_a_cuda_device_converts_nothing_beforehand() -> None:
    assert (
        simulated(accumulates_unlike_dtypes, "cpu") - simulated(accumulates_unlike_dtypes, "cuda")
        == 4 * COUNT
    )


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "muon"])
def test_temporaries_of_an_update_are_as_large_as_slices(
    monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Except for Muon, which needs the whole matrix."""
    for module in (optim_module, update_module):
        monkeypatch.setattr(module, "UPDATE_SLICE", 10 * 256)
    few, many = (simulated(updates_by(optimizer, rows), "cpu") for rows in (1000, 2000))
    recipe = Recipe.model_validate({"model": "-", "data": "-", "optimizer": optimizer})
    forms = optimizer_of("layers.0.weight", torch.Size([1000, 256]), recipe).state.values()
    state = sum(shape.numel() * dtype.itemsize for shape, dtype in forms)
    assert many - few == pytest.approx(1000 * 256 * (2 + 4) + state, abs=4096)


def test_bytes_and_values_computed_from_them_are_fake() -> None:
    with fake_world(nn.Module()):
        codes = torch.zeros(COUNT, dtype=torch.uint8)
        assert isinstance(codes.int().add_(1), FakeTensor) and not isinstance(torch.arange(9), FakeTensor)
        assert isinstance(torch.randint(0, 9, (COUNT,)) + 1, FakeTensor), (
            "random bits for rounding weights are fake too"
        )


def test_operators_that_fake_tensors_need_handlers_for() -> None:
    with fake_world(nn.Module()):
        weight, mask = torch.ones(4, 16), torch.tensor([True, False, True, True])
        assert isinstance(weight, FakeTensor) and not isinstance(mask, FakeTensor)
        assert weight[mask].shape == (3, 16), "masks are real, so the number of rows is known"
        assert weight.add_(weight) is weight
        assert weight.sum().item() == 1.0
        assert weight.T.device == torch.device("cpu")
        ends = torch.tensor([1, 4], dtype=torch.int32)
        assert torch.ops.aten._grouped_mm(weight, torch.ones(2, 16, 8), offs=ends).shape == (4, 8)  # in fp32
        assert torch.ops.aten._grouped_mm(weight.T, torch.ones(4, 8), offs=ends).shape == (2, 16, 8)
