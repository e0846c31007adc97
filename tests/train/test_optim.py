"""The optimizers against PyTorch's, and what holds for them in general."""

from __future__ import annotations

import pytest
import torch

from conftest import make_recipe
from talik.train import update as update_module
from talik.train.optim import adamw_, learning_rate_at, round_stochastically_
from talik.train.scratch import MemoryScratch
from talik.train.update import update


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_pytorchs(decay: float) -> None:
    recipe = make_recipe(weight_decay=decay)
    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(1000))
    ours, mean, square = theirs.detach().clone(), torch.zeros(1000), torch.zeros(1000)
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=decay)
    for step in range(1, 21):
        gradient = torch.randn(1000)
        theirs.grad = gradient.clone()
        optimizer.step()
        adamw_(ours, gradient, mean, square, step=step, learning_rate=1e-2, weight_decay=decay, recipe=recipe)
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7), step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    trained = []
    for size in (1 << 24, 7):
        monkeypatch.setattr(update_module, "SLICE", size)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(
            torch.randn(5, 9).to(torch.float32 if precision == "fp32" else torch.bfloat16)
        )
        scratch = MemoryScratch(torch.device("cpu"))
        scratch["gradient/w"], scratch["master/w"] = torch.randn(5, 9), weight.detach().float()
        for state in ("exp_avg", "exp_avg_sq"):
            scratch.zeros(f"{state}/w", weight.shape, torch.float32)
        update("w", weight, scratch, make_recipe(precision=precision), torch.tensor(0.5), 1, 0.01)
        trained.append(weight.detach().clone())
    assert torch.equal(*trained)


def test_stochastic_rounding_is_right_on_average_and_keeps_bf16_numbers() -> None:
    torch.manual_seed(0)
    exact = torch.full((200_000,), 1.0 + 0.3 * 2**-7)  # 0.3 of the way to the next bf16 number
    target = torch.empty(exact.shape, dtype=torch.bfloat16)
    round_stochastically_(target, exact)
    assert set(target.tolist()) == {1.0, 1.0 + 2**-7}
    assert target.double().mean().item() == pytest.approx(exact[0].item(), abs=3e-5)
    already = torch.randn(1000).bfloat16()
    target = torch.empty_like(already)
    round_stochastically_(target, already.float())
    assert torch.equal(target, already)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_then_falls(schedule: str) -> None:
    recipe = make_recipe(schedule=schedule, warmup=0.1, learning_rate=0.01)
    rates = [learning_rate_at(recipe, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.001 * i for i in range(1, 11)])
    assert max(rates) == pytest.approx(0.01)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert (rates[-1] == pytest.approx(0.01)) if schedule == "constant" else (0 < rates[-1] < 2e-4)
    assert learning_rate_at(make_recipe(warmup=0.0), 1, 1) > 0
