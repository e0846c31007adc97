"""AdamW with 8-bit state against the definition in the paper, and its distance from AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.training import make_recipe
from helpers.updates import HEAD, MATRIX, RATE, noise, train, weights
from talik.kernels.blockwise import dequantized, dynamic_map, quantize_
from talik.training.memory.keys import Key
from talik.training.step.optim import optimizer_of


def nearest(numbers: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in the paper: a block is divided by its absolute maximum and rounded to the map."""
    blocks = exact.view(-1, 256)
    absmax = blocks.abs().max(1, keepdim=True).values
    codes = ((blocks / absmax)[..., None] - numbers).abs().min(-1).indices
    return codes, absmax


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_are_rounded_to_the_nearest_of_the_map(signed: bool) -> None:
    numbers = torch.tensor(dynamic_map(signed))
    assert len(numbers) == 256 and torch.equal(numbers, numbers.unique())
    assert numbers[-1] == 1 and numbers[0] == pytest.approx(-(1 - 0.45 / 64) if signed else 0)
    exact = torch.randn(8 * 256) * torch.logspace(-12, 3, 8).repeat_interleave(256)
    exact = exact if signed else exact.square()
    exact[256:512] = 0
    codes, absmax = torch.zeros(exact.shape, dtype=torch.uint8), torch.zeros(8)
    quantize_(codes, absmax, exact.clone(), signed=signed)
    expected, largest = nearest(numbers, exact)
    assert torch.equal(absmax, largest[:, 0]) and not dequantized(codes, absmax, signed=signed)[256:512].any()
    there = absmax > 0
    assert torch.equal(codes.view(-1, 256)[there].long(), expected[there])
    ours = dequantized(codes, absmax, signed=signed).view(-1, 256)[there]
    assert torch.equal(ours, (numbers[expected] * largest)[there])


def test_adamw_8bit_is_the_papers() -> None:
    """AdamW with its state rounded after each step, as the paper defines it."""
    ours, theirs, gradient = weights(16, 512), weights(16, 512).detach(), noise(16, 512)
    maps = [torch.tensor(dynamic_map(signed)) for signed in (True, False)]
    state = [torch.zeros(16, 512), torch.zeros(16, 512)]

    def compare(step: int, gradient: Tensor) -> None:
        theirs.mul_(1 - RATE * 0.1)
        mean, square = 0.9 * state[0] + 0.1 * gradient, 0.999 * state[1] + 0.001 * gradient**2
        root = (square / (1 - 0.999**step)).sqrt() + 1e-8
        theirs.sub_(RATE * mean / (1 - 0.9**step) / root)
        for index, exact in enumerate((mean, square)):
            codes, absmax = nearest(maps[index], exact)
            state[index] = (maps[index][codes] * absmax).view(16, 512)
        # A number halfway between two entries of the map may be rounded either way.
        assert ((ours - theirs).abs() < 1e-5).float().mean() > 0.999, step

    scratch = train(
        MATRIX, ours, make_recipe(optimizer="adamw-8bit", weight_decay=0.1), gradient, after=compare
    )
    assert scratch[Key("exp_avg", MATRIX)].dtype == scratch[Key("exp_avg_sq", MATRIX)].dtype == torch.uint8
    assert scratch[Key("exp_avg_absmax", MATRIX)].shape == (32,)


def test_adamw_8bit_stays_near_adamw() -> None:
    """Fifty steps of linear regression."""
    torch.manual_seed(1)
    inputs, wanted = torch.randn(400, 64), torch.randn(128, 64)
    losses, ways = [], []
    for optimizer in ("adamw", "adamw-8bit"):
        weight = nn.Parameter(torch.zeros(128, 64))
        recipe = make_recipe(optimizer=optimizer, weight_decay=0.0)
        train(MATRIX, weight, recipe, lambda _, w=weight: (w.detach() - wanted) @ inputs.T @ inputs / 400, 50)
        losses.append((weight.detach() - wanted).square().mean().item())
        ways.append(weight.detach())
    way = (ways[0] - ways[1]).norm() / ways[0].norm()
    assert 0 < way < 0.06 and losses[1] == pytest.approx(losses[0], rel=0.02), (way, losses)


def test_adamw_8bit_keeps_small_and_ragged_tensors_in_fp32() -> None:
    recipe = make_recipe(optimizer="adamw-8bit")
    for shape in ([4095], [15, 256], [64, 65]):
        assert {dtype for _, dtype in optimizer_of(HEAD, torch.Size(shape), recipe).state.values()} == {
            torch.float32
        }
    assert optimizer_of(HEAD, torch.Size([64, 64]), recipe).state["exp_avg"][1] == torch.uint8
