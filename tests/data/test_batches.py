"""Order, grouping and tensors: every example once, within the limits, equal for equal seeds."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from talik.data.batches import OVERHEAD, collate, equal_length_groups, micro_batches, steps_of_epoch
from talik.data.examples import Example, Span
from talik.data.messages import Conversation, Message
from talik.data.preparing.held_out import split_held_out
from talik.data.reading.rows import Place

DICE = random.Random(5)
LENGTHS = [DICE.randint(1, 60) for _ in range(500)] + [300, 300]


def flat(groups: list[list[int]]) -> list[int]:
    return [index for group in groups for index in group]


def test_every_example_once_per_epoch_and_no_step_over_its_tokens() -> None:
    for epoch in range(3):
        steps = steps_of_epoch(LENGTHS, 200, seed=1, epoch=epoch)
        assert sorted(flat(steps)) == list(range(len(LENGTHS)))
        assert all(len(step) == 1 or sum(LENGTHS[i] for i in step) <= 200 for step in steps)


def test_a_step_is_full() -> None:
    steps = steps_of_epoch(LENGTHS, 200, seed=1, epoch=0)
    for step, after in pairwise(steps):
        assert sum(LENGTHS[i] for i in step) + LENGTHS[after[0]] > 200


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = steps_of_epoch(LENGTHS, 200, seed=1, epoch=2)
    torch.manual_seed(7)
    torch.rand(3)
    assert steps_of_epoch(LENGTHS, 200, seed=1, epoch=2) == first
    drawn = [flat(steps_of_epoch(LENGTHS, 200, s, e)) for s in range(4) for e in range(4)]
    assert len({tuple(order) for order in drawn}) == 16  # a sum of seed and epoch would give 7


def test_the_order_is_the_one_that_earlier_runs_had() -> None:
    assert flat(steps_of_epoch([1] * 10, 4, seed=0, epoch=0)) == [1, 8, 7, 9, 5, 4, 3, 0, 2, 6]


def test_micro_batches_hold_a_step_by_length() -> None:
    indices = DICE.sample(range(len(LENGTHS)), 90)
    batches = micro_batches(indices, LENGTHS, 128)
    assert sorted(flat(batches)) == sorted(indices)
    assert flat(batches) == sorted(indices, key=lambda i: (LENGTHS[i], i))
    assert all(len(b) == 1 or len(b) * max(LENGTHS[i] for i in b) <= 128 for b in batches)
    assert micro_batches(indices[::-1], LENGTHS, 128) == batches
    assert micro_batches([500], LENGTHS, 128) == [[500]]


def test_micro_batches_are_the_cheapest_cut() -> None:
    """Comparison with all ways to cut twelve sorted examples."""
    lengths = sorted(DICE.sample(range(1, 200), 12))

    def cost(batches: list[list[int]]) -> int:
        return sum(len(batch) * lengths[batch[-1]] + OVERHEAD for batch in batches)

    def cuts() -> Iterator[list[list[int]]]:
        for marks in range(2**11):
            edges = [0, *(i + 1 for i in range(11) if marks >> i & 1), 12]
            yield [list(range(a, b)) for a, b in pairwise(edges)]

    allowed = (cut for cut in cuts() if all(len(b) == 1 or len(b) * lengths[b[-1]] <= 300 for b in cut))
    assert cost(micro_batches(range(12), lengths, 300)) == min(map(cost, allowed))


def test_groups_of_equal_length() -> None:
    groups = equal_length_groups(LENGTHS, 128)
    assert sorted(flat(groups)) == list(range(len(LENGTHS)))
    assert flat(groups) == sorted(range(len(LENGTHS)), key=lambda i: (LENGTHS[i], i))
    for group in groups:
        assert len({LENGTHS[i] for i in group}) == 1
        assert len(group) == 1 or len(group) * LENGTHS[group[0]] <= 128
    assert groups[-2:] == [[500], [501]]


def example(ids: list[int], start: int, stop: int) -> Example:
    spans = (Span(0, start, False), Span(start, stop, True), Span(stop, len(ids), False))
    return Example(array("i", ids), tuple(s for s in spans if s.start < s.stop), Place("rows.json", 1))


def test_collate_pads_by_position_though_pad_is_the_end() -> None:
    batch = collate([example([5, 6, 2, 7, 2], 3, 5), example([5, 8, 2], 1, 3)], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 7, 2], [5, 8, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, 2], [-100, 8, 2, -100, -100]]
    tensors = (batch["input_ids"], batch["attention_mask"], batch["labels"])
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_one_example_is_a_batch_of_two_dimensions() -> None:
    assert collate([example([1, 2, 3], 1, 3)], pad_id=0)["input_ids"].shape == (1, 3)


def asked(question: str, answer: str, line: int = 1) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), Place("rows.json", line))


def test_held_out_by_question() -> None:
    rows = [asked(q, f"answer {n}") for n in range(200) for q in (f"question {n}", f" QUESTION {n}\n")]
    trained, held = split_held_out(rows, 0.2, seed=3)
    assert sorted(map(id, trained + held)) == sorted(map(id, rows))
    key = {row.messages[0].content.strip().casefold() for row in trained}
    assert not key & {row.messages[0].content.strip().casefold() for row in held}
    assert 40 <= len(held) <= 120
    assert [r for r in rows if r in trained] == trained  # in the order of the data


def test_new_rows_move_no_other() -> None:
    rows = [asked(f"question {n}", "a") for n in range(300)]
    _, held = split_held_out(rows[:150], 0.1, seed=3)
    _, more = split_held_out(rows[::-1], 0.1, seed=3)
    assert [row for row in more[::-1] if row in rows[:150]] == held
    assert split_held_out(rows[:150], 0.1, seed=4)[1] != held


@pytest.mark.parametrize(
    ("fraction", "held"), [(0.0, 0), (1e-9, 1), (1 - 1e-9, 4), (1.0, 1), (3.0, 3), (99.0, 4)]
)
def test_no_side_is_empty_unless_asked_for(fraction: float, held: int) -> None:
    rows = [asked(f"question {n}", "a") for n in range(5)]
    trained, out = split_held_out(rows, fraction, seed=0)
    assert (len(trained), len(out)) == (5 - held, held)


@pytest.mark.parametrize("rows", [[], [asked("only", "a")], [asked("same", "a"), asked("Same", "b")]])
def test_a_single_question_is_trained_on(rows: list[Conversation]) -> None:
    assert split_held_out(rows, 0.5, seed=0) == (rows, [])


def test_only_what_may_share_a_batch_does() -> None:
    """Examples over a length with other rotary tables are in separate batches."""
    lengths = [5, 30, 6, 31, 7]
    apart = micro_batches(range(5), lengths, 1000, lambda length: length if length > 10 else 0)
    assert [sorted(batch) for batch in apart] == [[0, 2, 4], [1], [3]]


LENGTH_LISTS = st.lists(st.integers(1, 300), min_size=1, max_size=40)
LIMITS = st.integers(1, 400)


@given(LENGTH_LISTS, LIMITS, st.integers(0, 2**31), st.integers(0, 5), st.sampled_from(["seed", "file"]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_steps_of_any_lengths(lengths: list[int], limit: int, seed: int, epoch: int, shuffle: str) -> None:
    """Every example once; a step is within the limit or one example, and the next one did not fit."""
    steps = steps_of_epoch(lengths, limit, seed, epoch, shuffle)
    assert sorted(flat(steps)) == list(range(len(lengths)))
    assert shuffle == "seed" or flat(steps) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in step) for step in steps]
    assert all(len(step) == 1 or size <= limit for step, size in zip(steps, tokens, strict=True))
    assert all(size + lengths[after[0]] > limit for size, after in zip(tokens, steps[1:], strict=False))


@given(LENGTH_LISTS, LIMITS, st.integers(0, 300), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_micro_batches_of_any_step(lengths: list[int], limit: int, apart: int, data: st.DataObject) -> None:
    """Each index of the step once, padded tokens within the limit, and no batch across a rotary group."""
    step = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    batches = micro_batches(step, lengths, limit, lambda length: length > apart)
    assert flat(batches) == sorted(step, key=lambda i: (lengths[i], i))
    assert all(len({lengths[i] > apart for i in batch}) == 1 for batch in batches)
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= limit for b in batches)
    assert micro_batches(data.draw(st.permutations(step)), lengths, limit, lambda n: n > apart) == batches
