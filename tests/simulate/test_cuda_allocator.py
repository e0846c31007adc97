"""The caching allocator's rules on sequences calculated by hand, and invariants on random ones."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from talik.simulate.cuda import allocator
from talik.simulate.cuda.allocator import (
    GRID,
    MIB,
    Allocator,
    Block,
    ExpandableAllocator,
    Replayed,
    least_capacity,
    replay,
)

BOTH = pytest.mark.parametrize("expandable", [False, True])


def mib(*events: tuple[int, float]) -> list[tuple[int, int]]:
    """Events with sizes in MiB."""
    return [(key, int(size * MIB)) for key, size in events]


def native(events: list[tuple[int, int]], capacity: int | None = None) -> Replayed:
    return replay(events, capacity=capacity, expandable=False)


def test_constants_are_those_of_the_installed_torch() -> None:
    header = Path(torch.__file__).parent / "include/c10/core/AllocatorConfig.h"
    found = dict(re.findall(r"constexpr size_t (k\w+) = (\d+);", header.read_text(encoding="utf-8")))
    names = {"kMinBlockSize": "ROUNDING", "kSmallSize": "SMALL_LIMIT", "kSmallBuffer": "SMALL_SEGMENT"}
    names |= {"kMinLargeAlloc": "LARGE_LIMIT", "kRoundLarge": "LARGE_ROUNDING"}
    assert {ours: int(found[theirs]) for theirs, ours in names.items()} == {
        ours: getattr(allocator, ours) for ours in names.values()
    }


@BOTH
def test_sizes_are_rounded_to_512_bytes_and_nothing_takes_nothing(expandable: bool) -> None:
    assert replay([(1, 1), (2, 513), (3, 0)], expandable=expandable) == Replayed(1536, 2 * MIB, None)
    assert replay([(1, 0), (1, 0)], expandable=expandable) == Replayed(0, 0, None)


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2),
        (MIB, 2),
        (MIB + 1, 20),
        (10 * MIB - 512, 20),
        (10 * MIB, 10),
        (10 * MIB + 1, 12),
        (30 * MIB, 30),
    ],
)
def test_native_segments(size: int, segment: int) -> None:
    assert native([(1, size)]).peak_reserved == segment * MIB


@pytest.mark.parametrize(("size", "pages"), [(1, 2), (MIB, 2), (MIB + 1, 20), (20 * MIB, 20), (21 * MIB, 40)])
def test_expandable_segments_grow_by_pages(size: int, pages: int) -> None:
    assert replay([(1, size)]).peak_reserved == pages * MIB


@BOTH
def test_small_storages_share_a_segment(expandable: bool) -> None:
    events = mib((1, 1), (2, 1), (3, 0.5))  # the third needs a second segment of 2 MiB
    assert replay(events[:2], expandable=expandable).peak_reserved == 2 * MIB
    assert replay(events, expandable=expandable).peak_reserved == 4 * MIB


@BOTH
def test_the_block_of_a_freed_storage_is_used_again(expandable: bool) -> None:
    events = mib((1, 40), (1, 0), (2, 40), (2, -1), (3, 40))
    assert replay(events, expandable=expandable) == Replayed(40 * MIB, 40 * MIB, None)


def test_a_remainder_of_1_mib_is_split_off_in_expandable_segments_only() -> None:
    assert native(mib((1, 19))).peak_allocated == 20 * MIB  # of a segment of 20
    assert native([(1, 19 * MIB - 512)]).peak_allocated == 19 * MIB - 512
    assert replay([(1, 20 * MIB - 512)]).peak_allocated == 20 * MIB - 512
    events = mib((1, 19), (2, 1.5))
    assert native(events).peak_reserved == replay(events).peak_reserved == 40 * MIB
    assert replay(mib((1, 18.5), (2, 1.5))).peak_reserved == 20 * MIB


def test_the_best_fit_is_taken() -> None:
    """If the 14 MiB were taken from the block of 40, the next 40 would need another segment."""
    events = mib((1, 40), (2, 14), (1, 0), (2, 0), (3, 14), (4, 40))
    assert native(events).peak_reserved == 54 * MIB


@BOTH
def test_neighbours_are_merged_whatever_the_order_of_deaths(expandable: bool) -> None:
    for order in ([1, 2, 3, 4], [4, 3, 2, 1], [1, 3, 2, 4], [2, 4, 1, 3]):
        events = mib(*((key, 5) for key in range(1, 5)), *((key, 0) for key in order), (9, 20))
        assert replay(events, expandable=expandable) == Replayed(20 * MIB, 20 * MIB, None), order


def test_segments_are_not_merged_with_each_other() -> None:
    assert native(mib((1, 20), (2, 20), (1, 0), (2, 0), (3, 40))).peak_reserved == 80 * MIB


def test_unused_segments_are_given_back_when_the_device_is_full() -> None:
    events = mib((1, 30), (1, 0), (2, 60))
    assert native(events).peak_reserved == 90 * MIB
    assert native(events, 60 * MIB) == Replayed(60 * MIB, 60 * MIB, None)
    assert native(mib((1, 1), (1, 0), (2, 60)), 60 * MIB).failed is None
    split = mib((1, 20), (1, 0), (2, 5), (3, 60))  # 2 holds the first segment
    assert native(split, 70 * MIB).failed == 3
    assert native(split, 80 * MIB).failed is None


@BOTH
def test_the_event_that_does_not_fit_is_named(expandable: bool) -> None:
    events = mib((1, 40), (2, 40), (1, 0), (3, 60), (4, 1))
    assert replay(events, capacity=102 * MIB, expandable=expandable) == Replayed(101 * MIB, 102 * MIB, None)
    assert replay(events, capacity=100 * MIB, expandable=expandable).failed == 4
    assert replay(events, capacity=90 * MIB, expandable=expandable).failed == 3
    assert replay(events, capacity=60 * MIB, expandable=expandable) == Replayed(40 * MIB, 40 * MIB, 1)


def test_expandable_segments_need_less_where_native_ones_fragment() -> None:
    """Sizes that grow by a little: no dead native segment fits, though each is held by a small storage."""
    events = []
    for turn in range(8):
        events += mib((turn, 30 + 2 * turn), (100 + turn, 2), (turn, 0))
        events += mib((200 + turn, 4 + 2 * turn))
    assert replay(events).failed is None
    assert least_capacity(events) < least_capacity(events, expandable=False)


def test_pages_in_the_middle_are_unmapped_and_filled_first() -> None:
    """Three blocks of 40 MiB, the middle one free: its pages are unmapped if needed, then mapped again."""
    allocator = ExpandableAllocator(140 * MIB)
    blocks = [_allocate(allocator, 40 * MIB) for _ in range(3)]
    allocator.free(blocks[1])
    large = _allocate(allocator, 60 * MIB)  # not where 40 are free: at the end, for pages of the middle
    assert (large.address, allocator.reserved) == (120 * MIB, 140 * MIB)
    allocator.free(blocks[2])
    allocator.capacity = 180 * MIB
    again = _allocate(allocator, 70 * MIB)  # in the hole and the free block after it
    assert (again.address, allocator.reserved) == (40 * MIB, 180 * MIB)


def test_a_page_in_use_is_not_unmapped() -> None:
    allocator = ExpandableAllocator(60 * MIB)
    first, second = _allocate(allocator, 25 * MIB), _allocate(allocator, 10 * MIB)
    allocator.free(first)  # of its two pages, the second holds `second`, too
    assert allocator.allocate(50 * MIB) is None
    assert allocator.reserved == 20 * MIB
    allocator.free(second)
    assert _allocate(allocator, 50 * MIB).address == 0


@BOTH
def test_least_capacity_is_where_the_replay_begins_to_succeed(expandable: bool) -> None:
    assert least_capacity([], expandable=expandable) == 0
    assert least_capacity(mib((1, 40), (1, 0), (2, 60)), expandable=expandable) == 64 * MIB


def test_a_storage_cannot_be_born_twice() -> None:
    with pytest.raises(ValueError, match="event 1: storage 7"):
        replay([(7, 1), (7, 2)])


def test_held_bytes_are_the_pages_that_contain_a_storage() -> None:
    allocator = ExpandableAllocator()
    first, second = _allocate(allocator, 30 * MIB), _allocate(allocator, 25 * MIB)
    assert allocator.held == allocator.reserved == 60 * MIB
    allocator.free(first)  # of its two pages, the second holds `second`, too
    assert (allocator.held, allocator.reserved) == (40 * MIB, 60 * MIB)
    allocator.free(second)
    assert allocator.held == 0
    assert [allocator.pages_for(size) for size in (1, MIB, MIB + 1, 21 * MIB)] == [
        2 * MIB,
        2 * MIB,
        20 * MIB,
        40 * MIB,
    ]


def _allocate(allocator: Allocator, size: int) -> Block:
    block = allocator.allocate(size)
    assert block is not None
    return block


def _random_events(seed: int, count: int = 300) -> list[tuple[int, int]]:
    """Allocations and releases of storages from 1 byte to 40 MiB; in the end all are free."""
    chance, live, events = random.Random(seed), [], []
    for key in range(count):
        events.append((key, int(2 ** chance.uniform(0, 25.3))))
        live.append(key)
        while live and chance.random() < len(live) / 40:
            events.append((live.pop(chance.randrange(len(live))), 0))
    return events + [(key, 0) for key in live]


@BOTH
@pytest.mark.parametrize("seed", range(6))
def test_invariants_hold_after_every_event(expandable: bool, seed: int) -> None:
    events = _random_events(seed)
    capacity = least_capacity(events, expandable=expandable)
    allocator = (ExpandableAllocator if expandable else Allocator)(capacity)
    live: dict[int, Block] = {}
    for key, size in events:
        if size:
            live[key] = _allocate(allocator, size)
            assert live[key].size >= size
        else:
            allocator.free(live.pop(key))
        _check(allocator, list(live.values()))
    assert allocator.allocated == 0
    assert replay(events, capacity=capacity, expandable=expandable).failed is None
    assert replay(events, capacity=capacity - GRID, expandable=expandable).failed is not None


def _check(allocator: Allocator, live: list[Block]) -> None:
    """Blocks of a pool cover its memory without overlap, and the sums are those of the blocks."""
    assert allocator.allocated == sum(block.size for block in live) <= allocator.reserved
    mapped = 0
    for pool in (allocator.small, allocator.large):
        blocks = [block for block in live if block.pool is pool] + list(pool.starts.values())
        blocks.sort(key=lambda block: block.address)
        assert all(first.end <= second.address for first, second in pairwise(blocks))
        free = [(block.size, block.address) for block in pool.starts.values() if block.mapped]
        assert pool.free == sorted(free)
        mapped += sum(block.size for block in blocks if block.mapped)
    assert mapped == allocator.reserved
