"""Forward and backward of a top whose weights do not fit: layer by layer over all micro-batches of a step.

The forward saves only the input of each layer; the backward runs each layer again. So each layer's weights
are read once per step and direction, not once per micro-batch, and the peak memory does not grow with the
depth. Layers, micro-batches and sums have the same order as in a resident top: the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from talik.model.block import EMBEDDINGS, TAIL, Block
from talik.model.chain.chain import Skeleton, run_layers
from talik.recipe.plan import Plan
from talik.training.memory.keys import gradient, layer_input
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store
from talik.training.step.gradients import Updates, accumulated, make_gradients
from talik.training.step.loss import loss_backward
from talik.training.step.top import MicroBatch, Monitor, Top, World


@dataclass(slots=True)
class StreamedPass:
    """All micro-batches of a step while they go through the layers together.

    Attributes:
        top: The trained part of the model.
        batches: The micro-batches.
        store: Loads the layers.
        scratch: Saves the input of each span of layers for the backward; None without a backward.
        skeletons: The arguments of every layer, by micro-batch.
        current: By micro-batch, the hidden states in the forward; their gradients in the backward.
        random_states: The random state before a layer, by the first layer of its span and micro-batch.
    """

    top: Top
    batches: Sequence[MicroBatch]
    store: Store
    scratch: Scratch | None = None
    skeletons: list[Skeleton] = field(default_factory=list[Skeleton])
    current: list[Tensor] = field(default_factory=list[Tensor])
    random_states: dict[tuple[int, int], list[Tensor]] = field(
        default_factory=dict[tuple[int, int], list[Tensor]]
    )

    def embed(self) -> None:
        """Records the arguments of all layers, and embeds the tokens if there is no trunk."""
        if self.top.embeddings:
            self.store.get(EMBEDDINGS)
        for batch in self.batches:
            no_trunk = batch.hidden is None
            self.skeletons.append(self.top.chain.skeleton(batch.input_ids, embed=no_trunk))
            self.current.append(self.skeletons[-1].embedded if batch.hidden is None else batch.hidden)
        if self.top.embeddings:
            self.store.release(EMBEDDINGS)

    @torch.no_grad()
    def forward(self, monitor: Monitor | None = None) -> None:
        """Runs all layers of the top, one span at a time; each is a phase of the monitor."""
        spans = self.top.layer_spans()
        for number, span in enumerate(spans):
            if monitor is not None:
                monitor.phase("forward")
            self.load(span)
            if number + 1 < len(spans):
                self.store.read_ahead(Block.layer(spans[number + 1][0]))
            for index in range(len(self.batches)):
                if self.scratch is not None:
                    self.scratch[layer_input(span[0], index)] = self.current[index]
                    self.random_states[span[0], index] = _random_state(self.top.chain.device)
                self.current[index] = self.run(span, index, self.current[index])
            self.release(span)

    def run(self, span: range, index: int, hidden: Tensor) -> Tensor:
        """Runs a span of layers over one micro-batch; the last layer computes trained positions only."""
        calls, positions = self.skeletons[index].calls, self.batches[index].positions
        return run_layers(self.top.chain, span, hidden, calls, positions)

    def load(self, span: range) -> None:
        """Loads a span of layers."""
        for layer in span:
            self.store.get(Block.layer(layer))

    def release(self, span: range) -> None:
        """Releases a span of layers."""
        for layer in span:
            self.store.release(Block.layer(layer))


def forward_streamed(
    top: Top, batches: Sequence[MicroBatch], store: Store
) -> Iterator[Float[Tensor, "batch sequence hidden"]]:
    """Yields the output of the last layer for each micro-batch, without a graph, while the tail is loaded."""
    run = StreamedPass(top, batches, store)
    run.embed()
    run.forward()
    store.get(TAIL)
    yield from run.current
    store.release(TAIL)


def forward_backward_streamed(
    top: Top, batches: Sequence[MicroBatch], world: World, plan: Plan, count: int, updates: Updates
) -> Float[Tensor, ""]:
    """Forward and backward of a streamed top over all micro-batches.

    Args:
        top: The trained part of the model.
        batches: The micro-batches.
        world: Store, scratch and monitor.
        plan: The chunk of the loss.
        count: The trained tokens of all micro-batches; the loss is divided by it.
        updates: Is called for every block when its backward is done and it is still loaded.

    Returns:
        The loss.
    """
    run = StreamedPass(top, batches, world.store, world.scratch)
    world.monitor.phase("forward")
    run.embed()
    run.forward(world.monitor)
    total = _tail(run, world, plan, count, updates)
    spans = top.layer_spans()
    for number in reversed(range(len(spans))):
        _backward(run, spans, number, world, updates)
    if top.embeddings:
        world.monitor.phase("backward", sum(own.numel() for _, own in top.of(EMBEDDINGS)))
        _backward_embeddings(run, world, updates)
    return total


def _tail(run: StreamedPass, world: World, plan: Plan, count: int, updates: Updates) -> Float[Tensor, ""]:
    """Computes the loss; afterwards `run.current` holds the gradients of the last layer's output."""
    top, scratch = run.top, world.scratch
    world.monitor.phase("loss")
    world.store.get(TAIL)
    parameters = dict(top.of(TAIL))
    make_gradients(parameters.items(), scratch)
    total = torch.zeros((), dtype=torch.float32, device=top.chain.device)
    for index, batch in enumerate(run.batches):
        world.monitor.phase("loss", batch.input_ids.numel())
        hidden = run.current[index]
        trained = hidden.flatten(0, 1)[batch.positions]
        sums = {parameter: scratch[gradient(name)] for name, parameter in parameters.items()}
        loss, trained_grad = loss_backward(top.chain, trained, batch.targets, sums, plan.loss_chunk, count)
        total += loss
        hidden_grad = torch.zeros_like(hidden)
        hidden_grad.view(-1, hidden.shape[-1])[batch.positions] = trained_grad
        run.current[index] = hidden_grad
        del hidden, trained, trained_grad, hidden_grad, sums
    parameters.clear()
    updates.block_done(TAIL)
    world.store.release(TAIL)
    return total


def _backward(run: StreamedPass, spans: Sequence[range], number: int, world: World, updates: Updates) -> None:
    """The backward of one span of layers over all micro-batches, while the span below it is read."""
    span, scratch = spans[number], world.scratch
    world.monitor.phase("backward")
    run.load(span)
    if number:
        world.store.read_ahead(Block.layer(spans[number - 1][-1]))
    input_grad = number > 0 or run.top.embeddings  # only if a block below is trained
    trained = [pair for layer in span for pair in run.top.of(Block.layer(layer))]
    make_gradients(trained, scratch)
    with accumulated(trained, scratch):
        for index in range(len(run.batches)):
            world.monitor.phase("backward", run.batches[index].input_ids.numel())
            _backward_batch(run, span, index, scratch, input_grad=input_grad)
    trained.clear()
    for layer in reversed(span):
        updates.block_done(Block.layer(layer))
    run.release(span)


def _backward_batch(
    run: StreamedPass, span: range, index: int, scratch: Scratch, *, input_grad: bool
) -> None:
    """Runs a span of layers again over one micro-batch, with a graph, and backward through it."""
    _set_random_state(run.top.chain.device, run.random_states.pop((span[0], index)))
    saved = scratch[layer_input(span[0], index)].to(run.top.chain.device)
    hidden = saved.detach().requires_grad_(input_grad)
    with torch.enable_grad():
        out = run.run(span, index, hidden)
    if out.requires_grad:  # False in a lowest layer without adapters
        out.backward(run.current[index])
    if hidden.grad is not None:
        run.current[index] = hidden.grad
    del saved, hidden, out
    scratch.drop(layer_input(span[0], index))


def _backward_embeddings(run: StreamedPass, world: World, updates: Updates) -> None:
    """Embeds the tokens again, with a graph, and runs backward through it."""
    world.store.get(EMBEDDINGS)
    trained = list(run.top.of(EMBEDDINGS))
    make_gradients(trained, world.scratch)
    with accumulated(trained, world.scratch):
        for batch, hidden_grad in zip(run.batches, run.current, strict=True):
            embedded = run.top.chain.skeleton(batch.input_ids, graph=True).embedded
            embedded.backward(hidden_grad)
            del embedded
    trained.clear()
    updates.block_done(EMBEDDINGS)
    world.store.release(EMBEDDINGS)


def _random_state(device: torch.device) -> list[Tensor]:
    """The random state of the CPU, and that of the device if it is another."""
    own = [torch.get_rng_state()]
    return own if device.type == "cpu" else [*own, torch.get_device_module(device).get_rng_state(device)]


def _set_random_state(device: torch.device, state: Sequence[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.get_device_module(device).set_rng_state(state[1], device)
