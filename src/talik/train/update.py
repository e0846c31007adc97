"""The update of what is trained: fp32 masters, the optimizer's state, and how a new weight is rounded.

Like the step that calls it, nothing in here reads a tensor's value or branches on one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from talik.recipe import Recipe
from talik.train.optim import OPTIMIZERS, SLICE, round_stochastically_
from talik.train.scratch import Scratch


def prepare(parameters: Iterable[tuple[str, nn.Parameter]], recipe: Recipe, scratch: Scratch) -> None:
    """Makes what lives as long as the run: fp32 masters (precision bf16) and the optimizer's state."""
    for name, parameter in parameters:
        if recipe.precision == "bf16":
            scratch[f"master/{name}"] = parameter.detach().float()
        for state in OPTIMIZERS[recipe.optimizer].state:
            scratch.zeros(f"{state}/{name}", parameter.shape, torch.float32)


@torch.no_grad()
def update(
    name: str,
    parameter: nn.Parameter,
    scratch: Scratch,
    recipe: Recipe,
    scale: Float[Tensor, ""] | None,
    step: int,
    learning_rate: float,
) -> None:
    """One parameter's update, slice by slice; its gradient is used up.

    bf16: the fp32 master is updated and the parameter rounded from it. bf16-sr: the parameter is updated in
    fp32 and rounded at random. fp32: in place.
    """
    optimizer = OPTIMIZERS[recipe.optimizer]
    master = scratch[f"master/{name}"] if recipe.precision == "bf16" else parameter
    working, exact, gradient, *state = (
        tensor.detach().view(-1)
        for tensor in (
            parameter,
            master,
            scratch[f"gradient/{name}"],
            *(scratch[f"{state}/{name}"] for state in optimizer.state),
        )
    )
    decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
    for slice_, weights, grads, *states in zip(
        *(tensor.split(SLICE) for tensor in (working, exact, gradient, *state)), strict=True
    ):
        if scale is not None:
            grads.mul_(scale)
        weight = weights.float()  # a copy only for bf16-sr
        optimizer.update(
            weight,
            grads,
            *states,
            step=step,
            learning_rate=learning_rate,
            weight_decay=decay,
            recipe=recipe,
        )
        if recipe.precision == "bf16":
            slice_.copy_(weight)
        elif recipe.precision == "bf16-sr" and parameter.dtype == torch.bfloat16:
            round_stochastically_(slice_, weight)
    scratch.drop(f"gradient/{name}")
