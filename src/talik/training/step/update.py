"""The update of what is trained: fp32 masters, the optimizer's state, and how a new weight is rounded.

Like the step that calls it, nothing in here reads a tensor's value or branches on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from talik.base.files import fingerprint
from talik.recipe.recipe import Recipe
from talik.training.memory.scratch import Scratch
from talik.training.step.optim import SLICE, Form, Now, optimizer_of, round_stochastically_


def kept(name: str, parameter: nn.Parameter, recipe: Recipe) -> dict[str, Form]:
    """The tensors that a run keeps for a trained one: fp32 master (precision bf16), optimizer's state."""
    state = optimizer_of(name, parameter.shape, recipe).state
    if recipe.precision == "bf16":
        state = {"master": (parameter.shape, torch.float32), **state}
    return {f"{kind}/{name}": form for kind, form in state.items()}


def gradients_wait(recipe: Recipe) -> bool:
    """Whether no gradient is used up before the norm of all is known."""
    return recipe.clip not in (0, "last")


def prepare(parameters: Iterable[tuple[str, nn.Parameter]], recipe: Recipe, scratch: Scratch) -> None:
    """Makes what lives as long as the run: fp32 masters (precision bf16) and the optimizer's state."""
    for name, parameter in parameters:
        for key, (shape, dtype) in kept(name, parameter, recipe).items():
            if key == f"master/{name}":
                # A copy where it is fp32 already, too: a streamed parameter's memory is another's soon.
                scratch[key] = parameter.detach().to(torch.float32, copy=True)
            else:
                scratch.zeros(key, shape, dtype)


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
    """One parameter's update, slice by slice; its gradient is used up. Matrices decay, vectors do not.

    bf16: the fp32 master is updated and the parameter rounded from it. bf16-sr: the parameter is updated in
    fp32 and rounded at random. fp32: in place.
    """
    optimizer, now = optimizer_of(name, parameter.shape, recipe), Now(step, learning_rate, recipe)
    gradient, device = scratch[f"gradient/{name}"], parameter.device
    state = [scratch[f"{kind}/{name}"] for kind in optimizer.state]
    if scale is not None:
        gradient.mul_(scale)
    if optimizer.direction is not None:
        with _brought(state, device) as near:
            optimizer.direction(gradient, *near, now)
        state = []  # which has its part in the direction
    master = scratch[f"master/{name}"] if recipe.precision == "bf16" else parameter
    # Its own noise for each parameter, so that it is the same in whatever order parameters are updated.
    seed = fingerprint(str(torch.initial_seed()), str(step), name)
    noise = torch.Generator(device).manual_seed(int(seed[:15], 16))
    decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
    for working, *kept in _slices(parameter, master, gradient, *state):
        with _brought(kept, device) as (exact, *sliced):
            weight = exact.float()  # a copy only for bf16-sr
            weight.mul_(1 - learning_rate * decay)
            optimizer.descend(weight, *sliced, now)
            if recipe.precision == "bf16":
                working.copy_(weight)
            elif recipe.precision == "bf16-sr" and parameter.dtype == torch.bfloat16:
                round_stochastically_(working, weight, noise)
            del weight, exact, sliced  # before the next ones are brought
    scratch.drop(f"gradient/{name}")


@contextmanager
def _brought(kept: Sequence[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
    """Tensors on the device that computes; what was kept elsewhere is put back there, changed."""
    near = [tensor.to(device) for tensor in kept]
    yield near
    for own, copy in zip(kept, near, strict=True):
        if copy is not own:
            own.copy_(copy)


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of at most SLICE elements of the first, and of the others what belongs to them."""
    whole = tensors[0].numel()
    flat = (tensor.detach().view(-1) for tensor in tensors)
    yield from zip(*(tensor.split(SLICE * tensor.numel() // whole) for tensor in flat), strict=True)
