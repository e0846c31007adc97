"""One step: forward, loss, backward, update. It touches the world only through store, scratch and monitor.

Nothing in here reads a tensor's value, branches on one, opens a file, starts a thread or compiles: the same
function runs on fake tensors when a run is planned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from talik.kernels.bf16_matmul import for_recompute
from talik.model.chain.chain import run_layers
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store
from talik.training.step.gradients import Updates, accumulated, loaded, make_gradients
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
    """One step over its micro-batches: the loss is the sum over its trained tokens divided by their count.

    Gradients accumulate in fp32. The monitor gets "loss" (before the update) and "grad_norm" (before
    clipping).
    """
    count = sum(len(batch.targets) for batch in batches)
    updates = Updates(top, world, recipe, step, learning_rate)
    if plan.top == "streamed":
        loss = forward_backward_streamed(top, batches, world, plan, count, updates)
    else:
        loss = forward_backward(top, batches, world, plan, count)
        for block in reversed(top.blocks):
            updates.block(block)
    world.monitor.scalar("loss", loss)
    world.monitor.scalar("grad_norm", updates.finish())


def prepare_top(top: Top, recipe: Recipe, store: Store, scratch: Scratch) -> None:
    """Makes what lives as long as the run, block by block: masters and the optimizer's state."""
    if recipe.clip == "last":
        scratch.zeros("norm", torch.Size(()), torch.float32)
    for block in top.blocks:
        with loaded(store, top, block):
            prepare(top.of(block), recipe, scratch)


def forward_backward(
    top: Top, batches: Sequence[MicroBatch], world: World, plan: Plan, count: int
) -> Float[Tensor, ""]:
    """The loss over all micro-batches; adds every trained parameter's gradient to the one in scratch."""
    scratch, phase = world.scratch, world.monitor.phase
    make_gradients(top.parameters(), scratch)
    tail = dict(top.of("tail"))
    total = torch.zeros((), dtype=torch.float32, device=top.chain.device)
    with accumulated((pair for block in top.blocks if block != "tail" for pair in top.of(block)), scratch):
        for batch in batches:
            tokens = batch.input_ids.numel()
            phase("forward", tokens)
            hidden = run_top(top, batch, recompute=plan.recompute, graph=True)
            phase("loss", tokens)
            rows = hidden.flatten(0, 1)[batch.rows]
            sums = {parameter: scratch[f"gradient/{name}"] for name, parameter in tail.items()}
            loss, of_rows = loss_backward(top.chain, rows, batch.targets, sums, plan.loss_chunk, count)
            total += loss
            phase("backward", tokens)
            if rows.requires_grad:
                rows.backward(of_rows)
            del hidden, rows, of_rows
    return total


def run_top(
    top: Top, batch: MicroBatch, *, recompute: bool = False, graph: bool = False
) -> Float[Tensor, "batch sequence hidden"]:
    """The top layers over one micro-batch, with the calls of a fresh skeleton; the last at trained rows.

    `recompute`: nothing inside a layer is kept for the backward, which runs the layer again with the same
    random state; layers that share what they do not hand on are run again together. `graph`: gradients reach
    the embeddings, where those are trained.
    """
    chain, own = top.chain, batch.hidden is None
    skeleton = chain.skeleton(batch.input_ids, embed=own, graph=own and graph)
    hidden, calls = skeleton.embedded if batch.hidden is None else batch.hidden, skeleton.calls
    if not recompute:
        return run_layers(chain, range(top.cut, len(chain.layers)), hidden, calls, batch.rows)
    for group in top.groups():
        given = (chain, group, hidden, calls, batch.rows)
        hidden = checkpoint(run_layers, *given, use_reentrant=False, context_fn=for_recompute)
    return hidden
