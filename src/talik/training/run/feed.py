"""Turns examples and their cached hidden states into the micro-batches of a step, and runs the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from talik.data.batches import collate, micro_batches
from talik.data.examples import Example
from talik.data.preparing.stored_examples import lengths_at
from talik.model.chain.chain import Chain
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.training.step.loss import trained_positions
from talik.training.step.step import train_step
from talik.training.step.top import MicroBatch, Top, World
from talik.training.trunk.interfaces import HiddenStates


def load_micro_batches(
    examples: Sequence[Example],
    indices: Sequence[int],
    states: HiddenStates | None,
    plan: Plan,
    chain: Chain,
) -> Iterator[MicroBatch]:
    """Yields micro-batches of examples of similar length, on the device.

    Args:
        examples: The data.
        indices: The examples to load.
        states: The trunk's hidden states for `examples`; None if there is no trunk.
        plan: `micro_batch_tokens` limits the size of a micro-batch.
        chain: The model.
    """
    lengths = lengths_at(examples, indices)
    for members in micro_batches(range(len(indices)), lengths, plan.micro_batch_tokens, chain.rope_group):
        batch = collate([examples[indices[i]] for i in members], pad_id=0)
        positions, targets = trained_positions(batch["labels"])
        hidden = None if states is None else states.read([indices[i] for i in members])
        yield MicroBatch(
            input_ids=batch["input_ids"].to(chain.device),
            hidden=None if hidden is None else hidden.to(chain.device),
            positions=positions.to(chain.device),
            targets=targets.to(chain.device),
        )


def run_step(
    *,
    top: Top,
    examples: Sequence[Example],
    indices: Sequence[int],
    states: HiddenStates | None,
    world: World,
    recipe: Recipe,
    plan: Plan,
    step: int,
    learning_rate: float,
) -> list[MicroBatch]:
    """Runs one step over the examples with these indices; returns its micro-batches."""
    world.monitor.phase("forward")
    batches = list(load_micro_batches(examples, indices, states, plan, top.chain))
    top.train_mode(True)
    train_step(top, batches, world, recipe, plan, step=step, learning_rate=learning_rate)
    top.train_mode(False)
    return batches
