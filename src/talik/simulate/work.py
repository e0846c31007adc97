"""What goes through a simulated run: the examples, groups and steps of a real one that take most."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import replace

from talik.data.batches import micro_batches, steps_of_epoch
from talik.data.examples import Example, Span
from talik.data.preparing.store import Joined, lengths_at, lengths_of
from talik.data.reading.rows import Place
from talik.model.chain.chain import Chain
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.simulate.simulation import Work
from talik.training.run.loop import count_steps
from talik.training.trunk.cache_shard import longest_groups

LOOKED_AT = 2000  # steps whose micro-batches are worked out: the fullest ones
# Micro-batches of a step that are simulated, the largest: the others differ by being smaller, and by how many
# of their tokens are trained.
BATCHES = 2
# About so much of what the last layer keeps for the backward is kept at trained rows alone: an MLP.
LAST = 0.75


def glimpse_of(work: Work, plan: Plan, chain: Chain) -> Work:
    """Of the work of a plan one step with its largest micro-batch: what it takes is about the same."""
    batches = _batches(work.steps[0], work.examples, plan, chain)
    return replace(work, steps=[batches[0]], waiting=[*work.waiting, *_joined(batches[1:])])


def work_of(
    examples: Sequence[Example], evaluated: Sequence[Example], plan: Plan, recipe: Recipe, chain: Chain
) -> Work:
    """The two groups with the longest examples, and one to three steps.

    The largest micro-batch's, the longest example's and that of the one whose loss takes most, where they
    differ: the same step a second time takes as much as the first (docs/log.md).
    """
    both = Joined(examples, evaluated)
    lengths = both.lengths
    tokens, chosen = sum(lengths), longest_groups(both, plan.trunk_batch_tokens, 2)
    held_out = sorted(range(len(examples), len(both)), key=lambda i: -lengths[i])
    if held_out:
        held_out = held_out[: max(1, plan.micro_batch_tokens // lengths[held_out[0]])]
    steps = _largest_steps(examples, plan, recipe, chain)
    return Work(
        examples=both,
        groups=chosen,
        steps=[step for step, _ in steps],
        evaluated=held_out,
        others=tokens / sum(group.tokens for group in chosen) - 1,
        waiting=max((waiting for _, waiting in steps), key=lambda some: sum(lengths[i] for i in some)),
    )


def _batches(step: Sequence[int], examples: Sequence[Example], plan: Plan, chain: Chain) -> list[list[int]]:
    """A step's micro-batches, the largest first; indices into `examples`."""
    lengths = lengths_at(examples, step)
    found = micro_batches(range(len(step)), lengths, plan.micro_batch_tokens, chain.rope_group)
    batches = [[step[i] for i in batch] for batch in found]
    return sorted(batches, key=lambda batch: -_size(batch, examples, plan))


def _size(batch: list[int], examples: Sequence[Example], plan: Plan) -> float:
    """Tokens that a micro-batch keeps for the backward, padding included; in the last layer fewer (LAST)."""
    tokens = len(batch) * max(examples[i].length for i in batch)
    layers = plan.layers - plan.cut
    if plan.recompute and layers > 1:  # another layer takes most
        return tokens
    rows = sum(examples[i].trained_tokens for i in batch)
    return tokens - LAST / max(1, layers) * (tokens - rows)


def _joined(batches: Sequence[Sequence[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def _largest_steps(
    examples: Sequence[Example], plan: Plan, recipe: Recipe, chain: Chain
) -> list[tuple[list[int], list[int]]]:
    """Of each step that is simulated the examples of its largest micro-batches, and those that wait."""
    lengths = lengths_of(examples)
    steps = _all_steps(lengths, recipe)
    fullest = _fullest(steps, lengths)
    longest = max(steps, key=lambda step: max(lengths[i] for i in step))
    split = [_batches(step, examples, plan, chain) for step in (longest, *fullest)]
    largest = max(split[1:], key=lambda batches: _size(batches[0], examples, plan))
    chosen = [largest] if largest == split[0] else [largest, split[0]]
    found = [(_joined(one[:BATCHES]), _joined(one[BATCHES:])) for one in chosen]

    def rows(batch: Sequence[int]) -> int:
        return min(plan.loss_chunk, sum(examples[i].trained_tokens for i in batch))

    most = max(split, key=lambda batches: max(map(rows, batches)))
    batches = sorted(most, key=rows, reverse=True)
    if rows(batches[0]) > max(map(rows, (*split[0][:BATCHES], *largest[:BATCHES]))):
        found.append((batches[0], _joined(batches[1:])))
    return found


def padded_tokens(examples: Sequence[Example], plan: Plan, recipe: Recipe, chain: Chain) -> int:
    """Tokens of a step's micro-batches with their padding, the most of the steps that have most tokens."""
    lengths = lengths_of(examples)
    return max(
        sum(len(batch) * max(lengths[i] for i in batch) for batch in _batches(step, examples, plan, chain))
        for step in _fullest(_all_steps(lengths, recipe), lengths)
    )


def _fullest(steps: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    return sorted(steps, key=lambda step: -sum(lengths[i] for i in step))[:LOOKED_AT]


def _all_steps(lengths: Sequence[int], recipe: Recipe) -> list[list[int]]:
    steps: list[list[int]] = []
    count, epochs = count_steps(lengths, recipe), itertools.count()
    while len(steps) < count:
        steps += steps_of_epoch(lengths, recipe.batch_tokens, recipe.seed, next(epochs), recipe.shuffle)
    return steps[:count]


def assumed_examples(recipe: Recipe) -> tuple[list[Example], str]:
    """A step of examples as long as the recipe allows, the last half of each trained, and that in words."""
    length, count = recipe.max_length, max(1, recipe.batch_tokens // recipe.max_length)
    spans = (Span(0, length // 2, False), Span(length // 2, length, True))
    made = [
        Example(array("i", [3 + number]) * length, spans, Place("assumed", number + 1))
        for number in range(count)
    ]
    each = f"{count} examples of {length:,} tokens" if count > 1 else f"one example of {length:,} tokens"
    return made, f"an epoch is one step of {each}, half of them trained (name DATA for what is true)"
