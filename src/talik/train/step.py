"""One step: forward, loss, backward, update. It touches the world only through store, scratch and monitor.

Nothing in here reads a tensor's value, branches on one, opens a file, starts a thread or compiles: the same
function runs on fake tensors when a run is planned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from talik.model.chain import Chain, run_layers
from talik.recipe import Plan, Recipe
from talik.train.loss import loss_backward
from talik.train.scratch import Scratch
from talik.train.store import Store
from talik.train.update import gradient_norm, update


@runtime_checkable
class Monitor(Protocol):
    """Where a step's scalars go; they stay tensors here. `phase` says what begins: "forward", "loss", ..."""

    def scalar(self, name: str, value: Float[Tensor, ""]) -> None: ...
    def phase(self, name: str, /) -> None: ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A few examples, right-padded: their tokens, what the trunk hands on, and the trained rows.

    `rows` are flat positions whose next token is trained, `targets` those tokens.
    """

    input_ids: Int[Tensor, "batch sequence"]
    attention_mask: Int[Tensor, "batch sequence"]
    hidden: Float[Tensor, "batch sequence hidden"]
    rows: Int[Tensor, " trained"]
    targets: Int[Tensor, " trained"]


@dataclass(frozen=True, slots=True)
class Top:
    """The thawed part: the chain, the cut, and the trained parameters of each block by full name."""

    chain: Chain
    cut: int
    blocks: dict[str, dict[str, nn.Parameter]]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for block in self.blocks.values():
            yield from block.items()

    def train_mode(self, on: bool) -> None:
        """Dropout in the top is on while a step runs, and off otherwise; the trunk never has any."""
        self.chain.model.eval()
        for layer in self.chain.layers[self.cut :]:
            layer.train(on)


def make_top(chain: Chain, trained: dict[str, nn.Parameter], cut: int | None = None) -> Top:
    """Sorts the trained parameters into blocks: "layer 17" and "tail".

    The cut is the first layer with a trained parameter, or given: lower, where layers share state.
    """
    of_layer = {name: chain.parts.part(name) for name in trained}
    if cut is None:
        layers = range(len(chain.layers))
        cut = next((i for i in layers if f"layer {i}" in of_layer.values()), len(chain.layers))
    blocks: dict[str, dict[str, nn.Parameter]] = {f"layer {i}": {} for i in range(cut, len(chain.layers))}
    blocks["tail"] = {}
    for name, parameter in trained.items():
        blocks[of_layer[name] if of_layer[name] in blocks else "tail"][name] = parameter
    return Top(chain, cut, blocks)


@dataclass(frozen=True, slots=True)
class World:
    """The three objects through which a step touches the world."""

    store: Store
    scratch: Scratch
    monitor: Monitor


def train_step(
    top: Top,
    batches: Sequence[MicroBatch],
    world: World,
    recipe: Recipe,
    plan: Plan,
    *,
    step: int,
    learning_rate: float,
) -> None:
    """One step over its micro-batches: the loss is the sum over its trained tokens divided by their count.

    Gradients accumulate in fp32. The monitor gets "loss" (before the update) and "grad_norm" (before
    clipping).
    """
    count = sum(len(batch.targets) for batch in batches)
    world.monitor.phase("forward")
    for block, parameters in top.blocks.items():
        world.store.get(block)
        for name, parameter in parameters.items():
            world.scratch.zeros(f"gradient/{name}", parameter.shape, torch.float32)
    world.monitor.scalar("loss", forward_backward(top, batches, world, plan, count))
    world.monitor.phase("update")
    norm = gradient_norm((name for name, _ in top.parameters()), world.scratch)
    world.monitor.scalar("grad_norm", norm)
    scale = (recipe.clip / (norm + 1e-6)).clamp(max=1) if recipe.clip else None
    for block, parameters in top.blocks.items():
        for name, parameter in parameters.items():
            update(name, parameter, world.scratch, recipe, scale, step, learning_rate)
        world.store.put(block)
        world.store.release(block)


def forward_backward(
    top: Top, batches: Sequence[MicroBatch], world: World, plan: Plan, count: int
) -> Float[Tensor, ""]:
    """The loss over all micro-batches; adds every trained parameter's gradient to the one in scratch."""
    scratch, phase = world.scratch, world.monitor.phase

    def take(name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        scratch[f"gradient/{name}"].add_(parameter.grad)
        parameter.grad = None

    tail = top.blocks["tail"]
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: take(name, p))
        for name, parameter in top.parameters()
        if name not in tail
    ]
    total = torch.zeros((), dtype=torch.float32, device=top.chain.device)
    try:
        for batch in batches:
            phase("forward")
            hidden = run_top(top, batch, recompute=plan.recompute)
            phase("loss")
            rows = hidden.flatten(0, 1)[batch.rows]
            sums = {parameter: scratch[f"gradient/{name}"] for name, parameter in tail.items()}
            loss, of_rows = loss_backward(top.chain, rows, batch.targets, sums, plan.loss_chunk, count)
            total += loss
            phase("backward")
            if rows.requires_grad:
                rows.backward(of_rows)
            del hidden, rows, of_rows
    finally:
        for hook in hooks:
            hook.remove()
    return total


def run_top(
    top: Top, batch: MicroBatch, *, recompute: bool = False
) -> Float[Tensor, "batch sequence hidden"]:
    """The top layers over one micro-batch, with the calls of a fresh skeleton.

    `recompute`: nothing inside a layer is kept for the backward, which runs the layer again with the same
    random state; layers that share what they do not hand on are run again together.
    """
    chain, count = top.chain, len(top.chain.layers)
    calls = chain.skeleton(batch.input_ids, batch.attention_mask, embed=False).calls
    if not recompute:
        return run_layers(chain, range(top.cut, count), batch.hidden, calls)
    hidden = batch.hidden
    bounds = [i for i in range(top.cut, count) if chain.lowest_cut(i)[0] == i]
    for first, end in itertools.pairwise([*bounds, count]):
        hidden = checkpoint(run_layers, chain, range(first, end), hidden, calls, use_reentrant=False)
    return hidden
