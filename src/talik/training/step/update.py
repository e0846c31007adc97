"""The update of trained parameters: fp32 masters, optimizer state, and the rounding of new weights.

Like the step that calls it, no function in here reads a tensor's value or branches on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from talik.base.files import fingerprint
from talik.recipe.recipe import Recipe
from talik.training.memory.keys import MASTER, Key, gradient, master
from talik.training.memory.scratch import Scratch
from talik.training.step.optim import (
    UPDATE_SLICE,
    StepContext,
    TensorForm,
    optimizer_of,
    round_stochastically_,
)


def state_forms(name: str, parameter: nn.Parameter, recipe: Recipe) -> dict[Key, TensorForm]:
    """Shape and dtype of each tensor that a run stores for a trained parameter.

    These are the fp32 master (precision bf16) and the optimizer's state.
    """
    state = optimizer_of(name, parameter.shape, recipe).state
    if recipe.precision == "bf16":
        state = {MASTER: (parameter.shape, torch.float32), **state}
    return {Key(kind, name): form for kind, form in state.items()}


def needs_global_norm(recipe: Recipe) -> bool:
    """True if gradients are clipped by the norm of this step, so that all must be known before an update."""
    return recipe.clip not in (0, "last")


def prepare(parameters: Iterable[tuple[str, nn.Parameter]], recipe: Recipe, scratch: Scratch) -> None:
    """Creates the fp32 masters (precision bf16) and the optimizer's state, which live as long as the run."""
    for name, parameter in parameters:
        for key, (shape, dtype) in state_forms(name, parameter, recipe).items():
            if key.kind == MASTER:
                # A copy even if it is fp32 already: the memory of a streamed parameter is reused.
                scratch[key] = parameter.detach().to(torch.float32, copy=True)
            else:
                scratch.zeros(key, shape, dtype)


@runtime_checkable
class Rounding(Protocol):
    """How a parameter gets its new value, by precision.

    `source` is the tensor that the update reads and changes. `exact` gives an fp32 tensor to update for one
    slice of it, and `store` rounds the result into the parameter.
    """

    @property
    def source(self) -> Tensor: ...
    def exact(self, part: Float[Tensor, " n"]) -> Float[Tensor, " n"]: ...
    def store(self, target: Tensor, weight: Float[Tensor, " n"]) -> None: ...


@dataclass(frozen=True, slots=True)
class MasterRounding:
    """bf16: the fp32 master is updated in place, and the parameter is rounded from it."""

    source: Tensor

    def exact(self, part: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The slice of the master itself."""
        return part

    def store(self, target: Tensor, weight: Float[Tensor, " n"]) -> None:
        """Rounds to nearest."""
        target.copy_(weight)


@dataclass(frozen=True, slots=True)
class StochasticRounding:
    """bf16-sr: the parameter is updated in fp32 and rounded stochastically; there is no master."""

    source: Tensor
    noise: torch.Generator

    def exact(self, part: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """An fp32 copy of the slice."""
        return part.float()

    def store(self, target: Tensor, weight: Float[Tensor, " n"]) -> None:
        """Rounds up or down at random."""
        round_stochastically_(target, weight, self.noise)


@dataclass(frozen=True, slots=True)
class InPlace:
    """fp32: the parameter itself is updated, and nothing is rounded."""

    source: Tensor

    def exact(self, part: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The slice of the parameter itself."""
        return part

    def store(self, target: Tensor, weight: Float[Tensor, " n"]) -> None:
        """A no-op: the update has changed the parameter."""


def rounding_of(name: str, parameter: nn.Parameter, scratch: Scratch, recipe: Recipe, step: int) -> Rounding:
    """The rounding of one parameter. A parameter that is fp32 is updated in place under bf16-sr, too."""
    if recipe.precision == "bf16":
        return MasterRounding(scratch[master(name)])
    if recipe.precision == "bf16-sr" and parameter.dtype == torch.bfloat16:
        # Each parameter has its own noise, so that the order of the updates does not change it.
        seed = fingerprint(str(torch.initial_seed()), str(step), name)
        noise = torch.Generator(parameter.device).manual_seed(int(seed[:15], 16))
        return StochasticRounding(parameter, noise)
    return InPlace(parameter)


@torch.no_grad()
def update(
    name: str,
    parameter: nn.Parameter,
    scratch: Scratch,
    recipe: Recipe,
    *,
    scale: Float[Tensor, ""] | None,
    step: int,
    learning_rate: float,
) -> None:
    """Updates one parameter slice by slice, and drops its gradient. Weight decay applies to matrices only.

    Args:
        name: The name of the parameter's gradient and state.
        parameter: The parameter, on the device that computes.
        scratch: Has the gradient, the optimizer's state and, for bf16, the master.
        recipe: The optimizer, its settings and the precision.
        scale: The gradient is multiplied by it first (clipping).
        step: The number of the step, from 1.
        learning_rate: The learning rate of this step.
    """
    optimizer = optimizer_of(name, parameter.shape, recipe)
    context = StepContext(step, learning_rate, recipe)
    own_gradient, device = scratch[gradient(name)], parameter.device
    if scale is not None:
        own_gradient.mul_(scale)
    state = [scratch[Key(kind, name)] for kind in optimizer.state]
    if optimizer.direction is not None:
        with _on_device(state, device) as near:
            optimizer.direction(own_gradient, *near, context)
        state = []  # the direction has used it; `descend` takes none
    rounding = rounding_of(name, parameter, scratch, recipe, step)
    decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
    for target, *parts in _slices(parameter, rounding.source, own_gradient, *state):
        with _on_device(parts, device) as (source, *sliced):
            weight = rounding.exact(source)
            weight.mul_(1 - learning_rate * decay)
            optimizer.descend(weight, *sliced, context)
            rounding.store(target, weight)
            del weight, source, sliced  # free them before the next slice is copied
    scratch.drop(gradient(name))


@contextmanager
def _on_device(tensors: Sequence[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
    """Copies offloaded tensors to the device, and copies their new values back at the end."""
    near = [tensor.to(device) for tensor in tensors]
    yield near
    for own, copy in zip(tensors, near, strict=True):
        if copy is not own:
            own.copy_(copy)


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding slices of flattened tensors, with at most UPDATE_SLICE elements of the first.

    A tensor with fewer elements (one scale per block) is split in proportion.
    """
    whole = tensors[0].numel()
    flat = (tensor.detach().view(-1) for tensor in tensors)
    yield from zip(*(tensor.split(UPDATE_SLICE * tensor.numel() // whole) for tensor in flat), strict=True)
