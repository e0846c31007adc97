"""Updates of one parameter with made-up gradients, for the tests of the optimizers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from talik.recipe.recipe import Recipe
from talik.training.memory.keys import gradient as gradient_key
from talik.training.memory.scratch import MemoryScratch
from talik.training.step.update import prepare, update

MATRIX = "model.layers.3.mlp.up_proj.weight"
HEAD = "lm_head.weight"
RATE = 1e-2


def weights(*shape: int) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(shape))


def prepared(name: str, parameter: nn.Parameter, recipe: Recipe) -> MemoryScratch:
    scratch = MemoryScratch(torch.device("cpu"))
    prepare([(name, parameter)], recipe, scratch)
    return scratch


def train(
    name: str,
    parameter: nn.Parameter,
    recipe: Recipe,
    gradient: Callable[[int], Tensor],
    steps: int = 20,
    after: Callable[[int, Tensor], None] = lambda step, gradient: None,
) -> MemoryScratch:
    """Updates a parameter `steps` times, and calls `after` with each step and its gradient."""
    scratch = prepared(name, parameter, recipe)
    for step in range(1, steps + 1):
        new = gradient(step)
        scratch[gradient_key(name)] = new.clone()
        update(name, parameter, scratch, recipe, scale=None, step=step, learning_rate=RATE)
        after(step, new)
    return scratch


def noise(*shape: int) -> Callable[[int], Tensor]:
    """Gradients whose size differs from row to row and from step to step."""

    def of(step: int) -> Tensor:
        made = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        return made * torch.linspace(0.01, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)) * (1 + step % 3)

    return of
