"""The top when its weights do not fit: layer by layer over all micro-batches of a step, forward and back.

Of the forward only what goes into each layer is kept; the backward runs each layer again. So weights move
once per step and pass and not once per micro-batch, and the peak does not grow with the depth. The order of
layers and micro-batches is that of a resident top, and so is every sum: the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from talik.model.chain.chain import Skeleton, run_layers
from talik.recipe.plan import Plan
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store
from talik.training.step.gradients import Updates, accumulated, make_gradients
from talik.training.step.loss import loss_backward
from talik.training.step.top import MicroBatch, Top, World


@dataclass(slots=True)
class Pass:
    """All micro-batches of a step on their way: hidden states forward, their gradients on the way back.

    With a `scratch`, what goes into group g for batch b is kept there as `input/g/b`.
    """

    top: Top
    batches: Sequence[MicroBatch]
    store: Store
    scratch: Scratch | None = None
    skeletons: list[Skeleton] = field(default_factory=list)
    flowing: list[Tensor] = field(default_factory=list)
    random: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def embed(self) -> None:
        """The calls of all layers, and the embedded tokens where they are not the trunk's."""
        if self.top.embeddings:
            self.store.get("embeddings")
        for batch in self.batches:
            own = batch.hidden is None
            self.skeletons.append(self.top.chain.skeleton(batch.input_ids, embed=own))
            self.flowing.append(self.skeletons[-1].embedded if batch.hidden is None else batch.hidden)
        if self.top.embeddings:
            self.store.release("embeddings")

    @torch.no_grad()
    def forward(self, begin: Callable[[str], None] = lambda phase: None) -> None:
        """Through all layers from the cut on, one group of them at a time, each of which is told."""
        groups = self.top.groups()
        for number, group in enumerate(groups):
            begin("forward")
            self.load(group)
            if number + 1 < len(groups):
                self.store.read_ahead(f"layer {groups[number + 1][0]}")
            for index in range(len(self.batches)):
                if self.scratch is not None:
                    self.scratch[f"input/{group[0]}/{index}"] = self.flowing[index]
                    self.random[group[0], index] = _random_state(self.top.chain.device)
                self.flowing[index] = self.run(group, index, self.flowing[index])
            self.release(group)

    def run(self, group: range, index: int, hidden: Tensor) -> Tensor:
        """A group of layers over one micro-batch; the last layer at trained rows."""
        calls, rows = self.skeletons[index].calls, self.batches[index].rows
        return run_layers(self.top.chain, group, hidden, calls, rows)

    def load(self, group: range) -> None:
        for layer in group:
            self.store.get(f"layer {layer}")

    def release(self, group: range) -> None:
        for layer in group:
            self.store.release(f"layer {layer}")


def forward_streamed(
    top: Top, batches: Sequence[MicroBatch], store: Store
) -> Iterator[Float[Tensor, "batch sequence hidden"]]:
    """What the last layer hands on for each micro-batch, without any graph; the tail is loaded meanwhile."""
    run = Pass(top, batches, store)
    run.embed()
    run.forward()
    store.get("tail")
    yield from run.flowing
    store.release("tail")


def forward_backward_streamed(
    top: Top, batches: Sequence[MicroBatch], world: World, plan: Plan, count: int, updates: Updates
) -> Float[Tensor, ""]:
    """The loss over all micro-batches; `updates` is told of every block whose gradient is whole."""
    run = Pass(top, batches, world.store, world.scratch)
    world.monitor.phase("forward")
    run.embed()
    run.forward(world.monitor.phase)
    total = _tail(run, world, plan, count, updates)
    groups = top.groups()
    for number in reversed(range(len(groups))):
        _backward(run, groups, number, world, updates)
    if top.embeddings:
        world.monitor.phase("backward", sum(own.numel() for _, own in top.of("embeddings")))
        _backward_embeddings(run, world, updates)
    return total


def _tail(run: Pass, world: World, plan: Plan, count: int, updates: Updates) -> Float[Tensor, ""]:
    """The losses; what flows are the gradients at the last layer's results from here on."""
    top, scratch = run.top, world.scratch
    world.monitor.phase("loss")
    world.store.get("tail")
    trained = dict(top.of("tail"))
    make_gradients(trained.items(), scratch)
    total = torch.zeros((), dtype=torch.float32, device=top.chain.device)
    for index, batch in enumerate(run.batches):
        world.monitor.phase("loss", batch.input_ids.numel())
        hidden = run.flowing[index]
        rows = hidden.flatten(0, 1)[batch.rows]
        sums = {parameter: scratch[f"gradient/{name}"] for name, parameter in trained.items()}
        loss, of_rows = loss_backward(top.chain, rows, batch.targets, sums, plan.loss_chunk, count)
        total += loss
        gradient = torch.zeros_like(hidden)
        gradient.view(-1, hidden.shape[-1])[batch.rows] = of_rows
        run.flowing[index] = gradient
        del hidden, rows, of_rows, gradient, sums
    trained.clear()
    updates.block("tail")
    world.store.release("tail")
    return total


def _backward(run: Pass, groups: Sequence[range], number: int, world: World, updates: Updates) -> None:
    """One group's backward over all micro-batches, while the group below it is read."""
    group, scratch = groups[number], world.scratch
    world.monitor.phase("backward")
    run.load(group)
    if number:
        world.store.read_ahead(f"layer {groups[number - 1][-1]}")
    below = number > 0 or run.top.embeddings  # whether anything below is trained
    trained = [pair for layer in group for pair in run.top.of(f"layer {layer}")]
    make_gradients(trained, scratch)
    with accumulated(trained, scratch):
        for index in range(len(run.batches)):
            world.monitor.phase("backward", run.batches[index].input_ids.numel())
            _set_random_state(run.top.chain.device, run.random.pop((group[0], index)))
            kept = scratch[f"input/{group[0]}/{index}"].to(run.top.chain.device)
            hidden = kept.detach().requires_grad_(below)
            with torch.enable_grad():
                out = run.run(group, index, hidden)
            if out.requires_grad:  # not so in a lowest layer without adapters
                out.backward(run.flowing[index])
            if hidden.grad is not None:
                run.flowing[index] = hidden.grad
            del kept, hidden, out
            scratch.drop(f"input/{group[0]}/{index}")
    trained.clear()
    for layer in reversed(group):
        updates.block(f"layer {layer}")
    run.release(group)


def _backward_embeddings(run: Pass, world: World, updates: Updates) -> None:
    """The embedded tokens once more, with a graph, and back through it."""
    world.store.get("embeddings")
    trained = list(run.top.of("embeddings"))
    make_gradients(trained, world.scratch)
    with accumulated(trained, world.scratch):
        for batch, gradient in zip(run.batches, run.flowing, strict=True):
            embedded = run.top.chain.skeleton(batch.input_ids, graph=True).embedded
            embedded.backward(gradient)
            del embedded
    trained.clear()
    updates.block("embeddings")
    world.store.release("embeddings")


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU, and of the device that the layers run on."""
    own = [torch.get_rng_state()]
    return own if device.type == "cpu" else [*own, torch.get_device_module(device).get_rng_state(device)]


def _set_random_state(device: torch.device, state: Sequence[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.get_device_module(device).set_rng_state(state[1], device)
