"""Gradients from the backward that produces them to the update that uses them.

The life of one gradient, as tensors of the scratch:

1. `make_gradients` creates `gradient/NAME` in fp32 before the backward of its block. 2. Within `accumulated`,
the backward of each micro-batch adds to it. 3. `Updates.block_done` takes it over when its block is done.
Normally the parameter is updated at once. 4. It is stashed as `pending/NAME` if it is not complete (a tied
matrix gets another part from a lower block)
   or if the norm of all gradients is needed first (exact clipping). It is restored for the next part, or in
   `Updates.finish`.
5. `update` drops it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from talik.kernels.cross_entropy import accumulate_
from talik.model.block import Block
from talik.recipe.recipe import Recipe
from talik.training.memory.keys import NORM, gradient, pending
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store
from talik.training.step.top import Top, World
from talik.training.step.update import needs_global_norm, update


@contextmanager
def accumulated(parameters: Iterable[tuple[str, nn.Parameter]], scratch: Scratch) -> Iterator[None]:
    """Adds each gradient to its fp32 tensor in the scratch as soon as a backward has computed it."""

    def take(name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        accumulate_(scratch[gradient(name)], parameter.grad)
        parameter.grad = None

    with ExitStack() as stack:
        for name, own in parameters:
            hook = own.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))
            stack.callback(hook.remove)
        yield


def make_gradients(parameters: Iterable[tuple[str, nn.Parameter]], scratch: Scratch) -> None:
    """Creates gradients, filled with zeros, unless they exist; restores those that are pending."""
    for name, parameter in parameters:
        if pending(name) in scratch:
            restore(name, scratch)
        scratch.zeros(gradient(name), parameter.shape, torch.float32)


def stash(name: str, scratch: Scratch) -> None:
    """Sets a gradient aside until it is needed again; the scratch decides where it is stored."""
    scratch[pending(name)] = scratch[gradient(name)]
    scratch.drop(gradient(name))


def restore(name: str, scratch: Scratch) -> None:
    """Reverses `stash`."""
    scratch[gradient(name)] = scratch[pending(name)]
    scratch.drop(pending(name))


@contextmanager
def block_loaded(store: Store, top: Top, block: Block) -> Iterator[None]:
    """Keeps the trained parameters of a block in memory inside the context.

    Adapters are always in memory, so the frozen weights of their block are not loaded.
    """
    needed = top.needs_loading(block)
    if needed:
        store.get(block)
    yield
    if needed:
        store.release(block)


class Updates:
    """The updates of one step.

    Without clipping, and with clipping by the norm of the previous step, a block is updated as soon as its
    gradients are complete. For exact clipping all gradients stay pending until their norm is known; `finish`
    then loads the blocks once more and updates them.
    """

    def __init__(self, top: Top, world: World, recipe: Recipe, *, step: int, learning_rate: float) -> None:
        self._top, self._world, self._recipe = top, world, recipe
        self._step, self._learning_rate = step, learning_rate
        self._norms: dict[str, Float[Tensor, ""]] = {}
        self._scale = self._scale_by_last_norm() if recipe.clip == "last" else None
        self._all_pending = needs_global_norm(recipe)

    def block_done(self, block: Block) -> None:
        """Takes over the gradients of a block after its backward; the block must be loaded."""
        scratch = self._world.scratch
        for name, _ in self._top.of(block):
            if self._top.last_block(name) != block:
                stash(name, scratch)  # a block below adds to it
                continue
            if pending(name) in scratch:
                restore(name, scratch)
            self._norms[name] = torch.linalg.vector_norm(scratch[gradient(name)])
            if self._all_pending:
                stash(name, scratch)
        if not self._all_pending:
            self._update(block)

    def finish(self) -> Float[Tensor, ""]:
        """Carries out the updates that are left; returns the norm of all gradients before clipping."""
        norms = [self._norms[name] for name, _ in self._top.parameters()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self._recipe.clip == "last":
            self._world.scratch[NORM].copy_(norm)
        if self._all_pending:
            self._scale = _clip_scale(self._recipe.max_norm, norm)
            for block in self._top.blocks:
                with block_loaded(self._world.store, self._top, block):
                    self._update(block)
        return norm

    def _update(self, block: Block) -> None:
        scratch = self._world.scratch
        self._world.monitor.phase("update", sum(own.numel() for _, own in self._top.of(block)))
        for name, parameter in self._top.of(block):
            if self._top.last_block(name) != block:
                continue
            if self._all_pending:
                restore(name, scratch)
            update(
                name,
                parameter,
                scratch,
                self._recipe,
                scale=self._scale,
                step=self._step,
                learning_rate=self._learning_rate,
            )
        self._world.store.put(block)

    def _scale_by_last_norm(self) -> Float[Tensor, ""]:
        """The scale by the norm of the previous step.

        It is 0 before the first step, which is therefore not clipped; its learning rate is low.
        """
        return _clip_scale(self._recipe.max_norm, self._world.scratch[NORM])


def _clip_scale(max_norm: float, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The factor that reduces a gradient of this norm to a norm of at most `max_norm`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1)
