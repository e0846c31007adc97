"""Chooses the data of a simulation: the examples, groups and steps of a run that take the most memory."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import replace

from talik.data.batches import micro_batches, steps_of_epoch
from talik.data.examples import Example, Span
from talik.data.preparing.stored_examples import JoinedExamples, lengths_at, lengths_of
from talik.data.reading.rows import Place
from talik.model.chain.chain import Chain
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.simulate.simulation import Workload
from talik.training.run.loop import count_steps
from talik.training.trunk.cache_shard import longest_groups

LOOKED_AT = 2000  # steps for which micro-batches are computed: the fullest ones
# The largest micro-batches of a step are simulated. The others are smaller, or differ in how many
# of their tokens are trained.
BATCHES = 2
# Share of the activations of the last layer that is kept only at trained positions: its MLP.
LAST = 0.75


def glimpse_of(work: Workload, plan: Plan, chain: Chain) -> Workload:
    """One step with the largest micro-batch of a plan's work; its memory is about that of the whole."""
    batches = _batches(work.steps[0], work.examples, plan, chain)
    return replace(work, steps=[batches[0]], pending=[*work.pending, *_joined(batches[1:])])


def workload_of(
    examples: Sequence[Example], evaluated: Sequence[Example], plan: Plan, recipe: Recipe, chain: Chain
) -> Workload:
    """The two groups with the longest examples, and one to three steps.

    The steps are those with the largest micro-batch, the longest example, and the largest loss, if they
    differ. The same step a second time takes as much as the first (docs/log.md).
    """
    both = JoinedExamples(examples, evaluated)
    lengths = both.lengths
    tokens, chosen = sum(lengths), longest_groups(both, plan.trunk_batch_tokens, 2)
    held_out = sorted(range(len(examples), len(both)), key=lambda i: -lengths[i])
    if held_out:
        held_out = held_out[: max(1, plan.micro_batch_tokens // lengths[held_out[0]])]
    steps = _largest_steps(examples, plan, recipe, chain)
    return Workload(
        examples=both,
        groups=chosen,
        steps=[step for step, _ in steps],
        evaluated=held_out,
        others=tokens / sum(group.tokens for group in chosen) - 1,
        pending=max((pending for _, pending in steps), key=lambda some: sum(lengths[i] for i in some)),
    )


def _batches(step: Sequence[int], examples: Sequence[Example], plan: Plan, chain: Chain) -> list[list[int]]:
    """The micro-batches of a step as indices into `examples`, the largest first."""
    lengths = lengths_at(examples, step)
    found = micro_batches(range(len(step)), lengths, plan.micro_batch_tokens, chain.rope_group)
    batches = [[step[i] for i in batch] for batch in found]
    return sorted(batches, key=lambda batch: -_size(batch, examples, plan))


def _size(batch: list[int], examples: Sequence[Example], plan: Plan) -> float:
    """Tokens that a micro-batch keeps for the backward, padding included; fewer in the last layer (LAST)."""
    tokens = len(batch) * max(examples[i].length for i in batch)
    layers = plan.layers - plan.cut
    if plan.recompute and layers > 1:  # another layer takes the most
        return tokens
    rows = sum(examples[i].trained_tokens for i in batch)
    return tokens - LAST / max(1, layers) * (tokens - rows)


def _joined(batches: Sequence[Sequence[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def _largest_steps(
    examples: Sequence[Example], plan: Plan, recipe: Recipe, chain: Chain
) -> list[tuple[list[int], list[int]]]:
    """For each simulated step, the examples of its largest micro-batches and of those that stay pending."""
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
    """Tokens of the micro-batches of a step with padding, the largest number among the fullest steps."""
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
    """A step of examples of the maximum length with the last half trained, and a description."""
    length, count = recipe.max_length, max(1, recipe.batch_tokens // recipe.max_length)
    spans = (Span(0, length // 2, False), Span(length // 2, length, True))
    made = [
        Example(array("i", [3 + number]) * length, spans, Place("assumed", number + 1))
        for number in range(count)
    ]
    each = f"{count} examples of {length:,} tokens" if count > 1 else f"one example of {length:,} tokens"
    return made, f"an epoch is one step of {each}, half of them trained (name DATA for the true steps)"
