"""One training step: forward, loss, backward, update.

It reads and writes only through store, scratch and monitor. No function in here reads a tensor's value,
branches on one, opens a file, starts a thread or compiles: the planner runs the same code on fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from talik.kernels.bf16_matmul import for_recompute
from talik.model.block import TAIL
from talik.model.chain.chain import run_layers
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.training.memory.keys import NORM, gradient
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store
from talik.training.step.gradients import Updates, accumulated, block_loaded, make_gradients
from talik.training.step.loss import loss_backward
from talik.training.step.streamed import forward_backward_streamed
from talik.training.step.top import MicroBatch, Top, World
from talik.training.step.update import prepare


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
    """Runs one step over its micro-batches.

    The loss is the sum over all trained tokens of the step divided by their number. Gradients accumulate in
    fp32. The monitor receives "loss" (before the update) and "grad_norm" (before clipping).

    Args:
        top: The trained part of the model.
        batches: The micro-batches.
        world: Store, scratch and monitor; the scratch was prepared by `prepare_top`.
        recipe: Optimizer, precision and clipping.
        plan: Whether the top is streamed, whether activations are recomputed, and the chunk of the loss.
        step: The number of the step, from 1.
        learning_rate: The learning rate of this step.
    """
    count = sum(len(batch.targets) for batch in batches)
    updates = Updates(top, world, recipe, step=step, learning_rate=learning_rate)
    if plan.top == "streamed":
        loss = forward_backward_streamed(top, batches, world, plan, count, updates)
    else:
        loss = forward_backward(top, batches, world, plan, count)
        for block in reversed(top.blocks):
            updates.block_done(block)
    world.monitor.scalar("loss", loss)
    world.monitor.scalar("grad_norm", updates.finish())


def prepare_top(top: Top, recipe: Recipe, store: Store, scratch: Scratch) -> None:
    """Creates masters and optimizer state block by block; they live as long as the run."""
    if recipe.clip == "last":
        scratch.zeros(NORM, torch.Size(()), torch.float32)
    for block in top.blocks:
        with block_loaded(store, top, block):
            prepare(top.of(block), recipe, scratch)


def forward_backward(
    top: Top, batches: Sequence[MicroBatch], world: World, plan: Plan, count: int
) -> Float[Tensor, ""]:
    """Forward and backward of a resident top over all micro-batches.

    Args:
        top: The trained part of the model.
        batches: The micro-batches.
        world: Every trained parameter's gradient is added to the one in the scratch.
        plan: Whether activations are recomputed, and the chunk of the loss.
        count: The trained tokens of all micro-batches; the loss is divided by it.

    Returns:
        The loss.
    """
    scratch, phase = world.scratch, world.monitor.phase
    make_gradients(top.parameters(), scratch)
    tail = dict(top.of(TAIL))
    total = torch.zeros((), dtype=torch.float32, device=top.chain.device)
    with accumulated((pair for block in top.blocks if block != TAIL for pair in top.of(block)), scratch):
        for batch in batches:
            tokens = batch.input_ids.numel()
            phase("forward", tokens)
            hidden = run_top(top, batch, recompute=plan.recompute, graph=True)
            phase("loss", tokens)
            trained = hidden.flatten(0, 1)[batch.positions]
            sums = {parameter: scratch[gradient(name)] for name, parameter in tail.items()}
            loss, trained_grad = loss_backward(
                top.chain, trained, batch.targets, sums, plan.loss_chunk, count
            )
            total += loss
            phase("backward", tokens)
            if trained.requires_grad:
                trained.backward(trained_grad)
            del hidden, trained, trained_grad
    return total


def run_top(
    top: Top, batch: MicroBatch, *, recompute: bool = False, graph: bool = False
) -> Float[Tensor, "batch sequence hidden"]:
    """Runs the top layers over one micro-batch, with the arguments that a fresh skeleton recorded.

    The last layer computes the trained positions only.

    Args:
        top: The trained part of the model.
        batch: The micro-batch.
        recompute: Saves only each layer's input for the backward, which runs the layer again with the same
            random state. Layers that share state are run again together.
        graph: Connects trained embeddings to the graph, so that they get a gradient.
    """
    chain, no_trunk = top.chain, batch.hidden is None
    skeleton = chain.skeleton(batch.input_ids, embed=no_trunk, graph=no_trunk and graph)
    hidden, calls = skeleton.embedded if batch.hidden is None else batch.hidden, skeleton.calls
    if not recompute:
        return run_layers(chain, range(top.cut, len(chain.layers)), hidden, calls, batch.positions)
    for span in top.layer_spans():
        given = (chain, span, hidden, calls, batch.positions)
        hidden = checkpoint(run_layers, *given, use_reentrant=False, context_fn=for_recompute)
    return hidden
