"""Divides examples into steps and batches, and collates batches into tensors.

All functions depend on their arguments alone. So the position of a run in its data is two integers, and a
resumed run gets the same examples as an uninterrupted one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor

from talik.base.files import fingerprint
from talik.data.examples import IGNORED, Example

OVERHEAD = 64  # the fixed cost of a batch, in tokens that could be computed in the same time


class Batch(TypedDict):
    """The inputs of a causal LM of Transformers, padded on the right."""

    input_ids: Int64[Tensor, "batch sequence"]
    attention_mask: Int64[Tensor, "batch sequence"]
    labels: Int64[Tensor, "batch sequence"]


def steps_of_epoch(
    lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int, shuffle: str = "seed"
) -> list[list[int]]:
    """Divides the examples of an epoch into steps; each example is in exactly one step.

    Args:
        lengths: The number of tokens of each example.
        batch_tokens: The greatest number of tokens in a step; a longer example is a step of its own.
        seed: Seeds the order, together with the epoch.
        epoch: The number of the epoch.
        shuffle: "seed": a random order. "file": the order of the data.

    Returns:
        The indices of the examples of each step.
    """
    if shuffle == "file":
        return _fill(range(len(lengths)), lengths, batch_tokens)
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    permutation: Any = torch.randperm(len(lengths), generator=generator)
    order: list[int] = permutation.tolist()
    return _fill(order, lengths, batch_tokens)


def micro_batches(
    indices: Sequence[int],
    lengths: Sequence[int],
    micro_batch_tokens: int,
    alike: Callable[[int], Hashable] = lambda length: None,
) -> list[list[int]]:
    """Divides the examples of a step into micro-batches of examples of similar length.

    The examples are sorted by length and cut into consecutive batches. Among all ways to cut them, this is
    the one with the fewest tokens, including padding and OVERHEAD for each batch.

    Args:
        indices: The examples of the step.
        lengths: The number of tokens of all examples.
        micro_batch_tokens: The greatest number of tokens of a batch, including padding; a longer example is a
            batch of its own.
        alike: Returns a key for a length; only examples with equal keys share a batch (`Chain.rope_group`).

    Returns:
        The indices of the examples of each batch.
    """
    order = sorted(indices, key=lambda i: (lengths[i], i))
    together = itertools.groupby(order, key=lambda i: alike(lengths[i]))
    return [batch for _, part in together for batch in _cheapest(list(part), lengths, micro_batch_tokens)]


def _cheapest(order: list[int], lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Cuts examples of ascending length into the batches with the fewest tokens, by dynamic programming."""
    cost, begins = [0], [0]  # for the first n examples: the least cost, and the start of the last batch
    for stop, index in enumerate(order, start=1):
        longest = lengths[index]
        most = max(1, micro_batch_tokens // longest)
        starts = range(max(0, stop - most), stop)
        best = min(starts, key=lambda start: cost[start] + (stop - start) * longest)
        cost.append(cost[best] + (stop - best) * longest + OVERHEAD)
        begins.append(best)
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.insert(0, order[begins[stop] : stop])
        stop = begins[stop]
    return batches


def equal_length_groups(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Groups the examples by length, in ascending order of length and then in the order of the data.

    Nothing is padded, so the kernels that run, and with them every bit of the hidden states, depend on these
    groups alone.

    Args:
        lengths: The number of tokens of each example.
        batch_tokens: The greatest number of tokens in a group; a longer example is a group of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    alike = itertools.groupby(order, key=lambda i: lengths[i])
    return [group for _, indices in alike for group in _fill(indices, lengths, batch_tokens)]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Collates examples into one batch of shape (examples, longest), padded on the right with `pad_id`.

    Padding is masked by position, not by id, because `pad_id` may also be the token that ends a turn.
    """
    shape = (len(examples), max(example.length for example in examples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : example.length] = torch.tensor(example.input_ids)
        attention_mask[row, : example.length] = 1
        labels[row, : example.length] = torch.tensor(example.labels)
    return Batch(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def _fill(order: Iterable[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cuts `order` into runs of at most `batch_tokens` tokens; a longer example is a run of its own."""
    runs: list[list[int]] = []
    used = 0
    for index in order:
        if runs and used + lengths[index] <= batch_tokens:
            runs[-1].append(index)
            used += lengths[index]
        else:
            runs.append([index])
            used = lengths[index]
    return runs


def _mix(seed: int, epoch: int) -> int:
    """Hashes both numbers to 63 bits; unlike their sum it differs for (1, 2) and (2, 1)."""
    return int(fingerprint(str(seed), str(epoch)), 16) >> 65
