"""The optimizers: functions of tensors alone, applied in slices. One entry in OPTIMIZERS each.

None of them reads a value back, starts a thread or compiles, so that a simulated step runs them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from talik.recipe import Recipe

SLICE = 16 * 1024 * 1024  # elements that are updated at once: temporaries stay below 64 MiB a tensor


@dataclass(frozen=True, slots=True)
class Optimizer:
    """`state`: names of the fp32 tensors kept for each parameter, in the order `update` takes them."""

    state: tuple[str, ...]
    update: Callable[..., None]


def adamw_(
    weight: Float[Tensor, " n"],
    gradient: Float[Tensor, " n"],
    mean: Float[Tensor, " n"],
    square: Float[Tensor, " n"],
    *,
    step: int,
    learning_rate: float,
    weight_decay: float,
    recipe: Recipe,
) -> None:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in place on fp32 tensors; `step` counts from 1."""
    beta1, beta2 = recipe.beta1, recipe.beta2
    weight.mul_(1 - learning_rate * weight_decay)
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(recipe.epsilon)
    weight.addcdiv_(mean, denominator, value=-learning_rate / (1 - beta1**step))


OPTIMIZERS = {"adamw": Optimizer(state=("exp_avg", "exp_avg_sq"), update=adamw_)}


def round_stochastically_(target: Float[Tensor, " n"], exact: Float[Tensor, " n"]) -> None:
    """Writes fp32 `exact` into bf16 `target`, up or down at random, so that the mean is exact.

    Random bits are added below bf16's last one and cut off (as in Zamirai et al. 2020, arXiv 2010.06192).
    """
    bits = exact.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    target.copy_(rounded)


def learning_rate_at(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 1) of `steps`: a linear rise, then the schedule down to 0."""
    rise = round(recipe.warmup * steps)
    if step <= rise:
        return recipe.learning_rate * step / rise
    left = 1 - (step - rise - 1) / max(steps - rise, 1)
    if recipe.schedule == "linear":
        return recipe.learning_rate * left
    if recipe.schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1 - math.cos(math.pi * left))
    return recipe.learning_rate
