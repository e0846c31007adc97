"""Gradients between the backward that makes them and the update that uses them up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from talik.kernels.cross_entropy import accumulate_
from talik.recipe.recipe import Recipe
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store
from talik.training.step.top import Top, World
from talik.training.step.update import gradients_wait, update


@contextmanager
def accumulated(parameters: Iterable[tuple[str, nn.Parameter]], scratch: Scratch) -> Iterator[None]:
    """Inside, what a backward gives these parameters is added to the fp32 tensors `gradient/NAME` at once."""

    def take(name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        accumulate_(scratch[f"gradient/{name}"], parameter.grad)
        parameter.grad = None

    with ExitStack() as stack:
        for name, own in parameters:
            hook = own.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))
            stack.callback(hook.remove)
        yield


def make_gradients(parameters: Iterable[tuple[str, nn.Parameter]], scratch: Scratch) -> None:
    """Zeros for what is to be accumulated, unless it is there; what was kept of it is brought back."""
    for name, parameter in parameters:
        if f"kept/{name}" in scratch:
            bring_back(name, scratch)
        scratch.zeros(f"gradient/{name}", parameter.shape, torch.float32)


def keep(name: str, scratch: Scratch) -> None:
    """Puts a gradient where it can wait until it is needed again: the scratch decides where that is."""
    scratch[f"kept/{name}"] = scratch[f"gradient/{name}"]
    scratch.drop(f"gradient/{name}")


def bring_back(name: str, scratch: Scratch) -> None:
    """The reverse of `keep`."""
    scratch[f"gradient/{name}"] = scratch[f"kept/{name}"]
    scratch.drop(f"kept/{name}")


@contextmanager
def loaded(store: Store, top: Top, block: str) -> Iterator[None]:
    """Inside, what is trained of a block is in memory: what adapters stand beside need not be read for it."""
    away = top.away(block)
    if away:
        store.get(block)
    yield
    if away:
        store.release(block)


class Updates:
    """The updates of one step, each as soon as it may be.

    Clipped by the norm of the step before, or not at all, a block is updated once its gradient is whole. For
    exact clipping gradients are kept until the norm of all is known, and `finish` goes over the blocks once
    more, which it loads by itself.
    """

    def __init__(self, top: Top, world: World, recipe: Recipe, step: int, learning_rate: float) -> None:
        self._top, self._world, self._recipe = top, world, recipe
        self._step, self._rate = step, learning_rate
        self._norms: dict[str, Float[Tensor, ""]] = {}
        self._scale = self._by_last_norm() if recipe.clip == "last" else None
        self._waits = gradients_wait(recipe)

    def block(self, block: str) -> None:
        """A loaded block's gradients are whole, but for those to which an earlier block will add."""
        scratch = self._world.scratch
        for name, _ in self._top.of(block):
            if self._top.last_block(name) != block:
                keep(name, scratch)
                continue
            if f"kept/{name}" in scratch:
                bring_back(name, scratch)
            self._norms[name] = torch.linalg.vector_norm(scratch[f"gradient/{name}"])
            if self._waits:
                keep(name, scratch)
        if not self._waits:
            self._update(block)

    def finish(self) -> Float[Tensor, ""]:
        """What is left to be done; returns the norm of the whole gradient, before clipping."""
        norms = [self._norms[name] for name, _ in self._top.parameters()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self._recipe.clip == "last":
            self._world.scratch["norm"].copy_(norm)
        if self._waits:
            self._scale = _scale(self._recipe.max_norm, norm)
            for block in self._top.blocks:
                with loaded(self._world.store, self._top, block):
                    self._update(block)
        return norm

    def _update(self, block: str) -> None:
        scratch = self._world.scratch
        self._world.monitor.phase("update", sum(own.numel() for _, own in self._top.of(block)))
        for name, parameter in self._top.of(block):
            if self._top.last_block(name) != block:
                continue
            if self._waits:
                bring_back(name, scratch)
            update(name, parameter, scratch, self._recipe, self._scale, self._step, self._rate)
        self._world.store.put(block)

    def _by_last_norm(self) -> Float[Tensor, ""]:
        """The scale by the step before; the first step has none, and its rate is low."""
        return _scale(self._recipe.max_norm, self._world.scratch["norm"])


def _scale(most: float, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """What a gradient is multiplied with so that its norm is at most `most`."""
    return (most / (norm + 1e-6)).clamp(max=1)
