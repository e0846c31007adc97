"""Examples and what the trunk handed on for them, as the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from talik.data.batches import collate, micro_batches
from talik.data.examples import Example
from talik.data.preparing.store import lengths_at
from talik.model.chain.chain import Chain
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.training.step.loss import trained_rows
from talik.training.step.step import train_step
from talik.training.step.top import MicroBatch, Top, World
from talik.training.trunk.cache import States


def load_micro_batches(
    examples: Sequence[Example], indices: Sequence[int], states: States | None, plan: Plan, chain: Chain
) -> Iterator[MicroBatch]:
    """The examples with these indices, in groups of like length, with what the trunk handed on for them.

    Without `states` there is no trunk.
    """
    lengths = lengths_at(examples, indices)
    for group in micro_batches(range(len(indices)), lengths, plan.micro_batch_tokens, chain.rope_group):
        batch = collate([examples[indices[i]] for i in group], pad_id=0)
        rows, targets = trained_rows(batch["labels"])
        hidden = None if states is None else states.read([indices[i] for i in group])
        tensors = (batch["input_ids"], hidden, rows, targets)
        yield MicroBatch(*(None if tensor is None else tensor.to(chain.device) for tensor in tensors))  # pyright: ignore[reportArgumentType]


def run_step(
    top: Top,
    examples: Sequence[Example],
    indices: Sequence[int],
    states: States | None,
    world: World,
    recipe: Recipe,
    plan: Plan,
    step: int,
    learning_rate: float,
) -> list[MicroBatch]:
    """One step over the examples with these indices; returns its micro-batches."""
    world.monitor.phase("forward")
    batches = list(load_micro_batches(examples, indices, states, plan, top.chain))
    top.train_mode(True)
    train_step(top, batches, world, recipe, plan, step=step, learning_rate=learning_rate)
    top.train_mode(False)
    return batches
