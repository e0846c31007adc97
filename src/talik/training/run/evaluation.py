"""The loss over all trained tokens of a set, and how many of them are guessed right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from talik.base.events import Evaluation
from talik.data.examples import Example
from talik.kernels.cross_entropy import cross_entropy
from talik.recipe.plan import Plan
from talik.training.memory.store import Store
from talik.training.run.feed import load_micro_batches
from talik.training.step.step import run_top
from talik.training.step.streamed import forward_streamed
from talik.training.step.top import MicroBatch, Top
from talik.training.trunk.cache import States


def evaluation_of(mark: Mapping[str, Any]) -> Evaluation:
    """The evaluation that was kept as JSON."""
    return Evaluation(mark["loss"], mark["accuracy"], int(mark["trained_tokens"]))


def evaluate_ranges(
    top: Top,
    examples: Sequence[Example],
    states: States | None,
    plan: Plan,
    store: Store,
    ranges: Sequence[tuple[str, int, int]],
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """The evaluation of all examples, and that of each named range of them; {} where there is only one."""
    if len(ranges) < 2:
        return evaluate_top(top, examples, states, plan, store), {}
    parts = {
        name: evaluate_top(top, examples, states, plan, store, range(start, stop))
        for name, start, stop in ranges
    }
    count = sum(part.trained_tokens for part in parts.values())
    loss = sum(part.loss * part.trained_tokens for part in parts.values()) / count
    right = sum(part.accuracy * part.trained_tokens for part in parts.values()) / count
    return Evaluation(loss, right, count), parts


@torch.no_grad()
def evaluate_top(
    top: Top,
    examples: Sequence[Example],
    states: States | None,
    plan: Plan,
    store: Store,
    indices: range | None = None,
) -> Evaluation:
    """The mean loss over all trained tokens of the examples, and the share of them guessed right.

    `indices`: of these examples alone.
    """
    top.train_mode(False)
    loss, right, count = 0.0, 0, 0
    batches = load_micro_batches(examples, indices or range(len(examples)), states, plan, top.chain)
    for batch, hidden in _through(top, batches, plan, store):
        batch_loss, batch_right = _evaluate_batch(top, batch, hidden, plan.loss_chunk)
        loss, right, count = loss + batch_loss, right + batch_right, count + len(batch.targets)
    return Evaluation(loss / count, right / count, count)


def _through(
    top: Top, batches: Iterable[MicroBatch], plan: Plan, store: Store
) -> Iterator[tuple[MicroBatch, Tensor]]:
    """Each micro-batch with what the last layer hands on; a streamed top takes several at once."""
    if plan.top == "resident":
        yield from ((batch, run_top(top, batch)) for batch in batches)
        return
    waiting: list[MicroBatch] = []
    held, token_bytes = 0, top.chain.width_at(top.cut) * top.chain.dtype_at(top.cut).itemsize
    for batch in batches:
        waiting.append(batch)
        held += batch.input_ids.numel() * token_bytes
        if held >= plan.hidden_bytes:
            yield from zip(waiting, forward_streamed(top, waiting, store), strict=True)
            waiting, held = [], 0
    if waiting:
        yield from zip(waiting, forward_streamed(top, waiting, store), strict=True)


def _evaluate_batch(top: Top, batch: MicroBatch, hidden: Tensor, chunk: int) -> tuple[float, int]:
    """The summed loss of a micro-batch and how many of its trained tokens were guessed right."""
    rows = hidden.flatten(0, 1)[batch.rows]
    loss, right = 0.0, 0
    for part, targets in zip(rows.split(chunk), batch.targets.split(chunk), strict=True):
        logits = top.chain.tail(part[None])[0]
        loss += cross_entropy(logits, targets).item()
        right += int((logits.argmax(-1) == targets).sum().item())
    return loss, right
