"""Evaluation: the mean loss over the trained tokens of a data set, and the accuracy."""

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
from talik.training.trunk.interfaces import HiddenStates


def evaluation_of(mark: Mapping[str, Any]) -> Evaluation:
    """Reads an evaluation from its JSON fields."""
    return Evaluation(mark["loss"], mark["accuracy"], int(mark["trained_tokens"]))


def evaluate_ranges(
    top: Top,
    examples: Sequence[Example],
    states: HiddenStates | None,
    plan: Plan,
    store: Store,
    ranges: Sequence[tuple[str, int, int]],
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """Evaluates all examples together, and each named range of them; {} if there is only one range."""
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
    states: HiddenStates | None,
    plan: Plan,
    store: Store,
    indices: range | None = None,
) -> Evaluation:
    """Computes the mean loss and the accuracy over all trained tokens.

    Args:
        top: The trained part of the model.
        examples: The data.
        states: The trunk's hidden states of the examples; None if there is no trunk.
        plan: How the top is run.
        store: Loads the blocks of a streamed top.
        indices: Only these examples are evaluated.
    """
    top.train_mode(False)
    loss, right, count = 0.0, 0, 0
    batches = load_micro_batches(examples, indices or range(len(examples)), states, plan, top.chain)
    for batch, hidden in _last_hidden(top, batches, plan, store):
        batch_loss, batch_right = _evaluate_batch(top, batch, hidden, plan.loss_chunk)
        loss, right, count = loss + batch_loss, right + batch_right, count + len(batch.targets)
    return Evaluation(loss / count, right / count, count)


def _last_hidden(
    top: Top, batches: Iterable[MicroBatch], plan: Plan, store: Store
) -> Iterator[tuple[MicroBatch, Tensor]]:
    """Yields each micro-batch with the output of the last layer.

    Several micro-batches go through a streamed top together, as the budget for hidden states allows.
    """
    if plan.top == "resident":
        yield from ((batch, run_top(top, batch)) for batch in batches)
        return
    together: list[MicroBatch] = []
    held, token_bytes = 0, top.chain.width_at(top.cut) * top.chain.dtype_at(top.cut).itemsize
    for batch in batches:
        together.append(batch)
        held += batch.input_ids.numel() * token_bytes
        if held >= plan.hidden_bytes:
            yield from zip(together, forward_streamed(top, together, store), strict=True)
            together, held = [], 0
    if together:
        yield from zip(together, forward_streamed(top, together, store), strict=True)


def _evaluate_batch(top: Top, batch: MicroBatch, hidden: Tensor, chunk: int) -> tuple[float, int]:
    """The summed loss of a micro-batch, and the number of its trained tokens that were predicted right."""
    trained = hidden.flatten(0, 1)[batch.positions]
    loss, right = 0.0, 0
    for part, targets in zip(trained.split(chunk), batch.targets.split(chunk), strict=True):
        logits = top.chain.tail(part[None])[0]
        loss += cross_entropy(logits, targets).item()
        right += int((logits.argmax(-1) == targets).sum().item())
    return loss, right
