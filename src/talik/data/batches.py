"""Chooses which examples go into which step, in which order, and builds the tensors.

Every result depends only on the arguments, so a position in the data is two integers, and a resumed run
continues with the same examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor

from talik.base.files import fingerprint
from talik.data.examples import IGNORED, Example

OVERHEAD = 64  # fixed cost of a batch, in tokens


class Batch(TypedDict):
    """The arguments of a causal LM of Transformers, padded on the right."""

    input_ids: Int64[Tensor, "batch sequence"]
    attention_mask: Int64[Tensor, "batch sequence"]
    labels: Int64[Tensor, "batch sequence"]


def steps_of_epoch(
    lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int, shuffle: str = "seed"
) -> list[list[int]]:
    """The steps of an epoch: every example exactly once.

    In an order drawn from `seed` and `epoch`, or with `shuffle` "file" in that of the data.

    A step holds at most `batch_tokens` tokens, or one example that is longer.
    """
    if shuffle == "file":
        return _fill(range(len(lengths)), lengths, batch_tokens)
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    return _fill(order, lengths, batch_tokens)


def micro_batches(
    indices: Sequence[int],
    lengths: Sequence[int],
    micro_batch_tokens: int,
    alike: Callable[[int], Hashable] = lambda length: None,
) -> list[list[int]]:
    """The examples of a step by ascending length, in batches of at most `micro_batch_tokens` tokens with
    padding.

    Only examples whose lengths have equal values of `alike` share a batch (`Chain.rope_group`). Among all
    ways to cut the order into batches, this is the one with the fewest tokens, counting padding and OVERHEAD
    per batch. An example that is longer is a batch of its own.
    """
    order = sorted(indices, key=lambda i: (lengths[i], i))
    together = itertools.groupby(order, key=lambda i: alike(lengths[i]))
    return [batch for _, part in together for batch in _cheapest(list(part), lengths, micro_batch_tokens)]


def _cheapest(order: list[int], lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """The cut of examples of ascending length into batches with the fewest tokens."""
    cost, begins = [0], [0]  # the cheapest cut of the first n examples, and the start of its last batch
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
    """Groups of examples of equal length, ascending, in the order of the data.

    At most `batch_tokens` tokens each, or one longer example. Nothing is padded, so the kernels, and with
    them every bit of a hidden state, depend only on these groups.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    alike = itertools.groupby(order, key=lambda i: lengths[i])
    return [group for _, indices in alike for group in _fill(indices, lengths, batch_tokens)]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Builds a batch of examples. Padding is known by position, not by id: `pad_id` may also end a turn."""
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
    """Cuts `order` into runs of at most `batch_tokens` tokens, or of one example."""
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
    """63 bits that differ for (1, 2) and (2, 1), unlike those of a sum."""
    return int(fingerprint(str(seed), str(epoch)), 16) >> 65
