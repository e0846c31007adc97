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
    Replayed,
    least_capacity,
    replay,
)


def mib(*events: tuple[int, float]) -> list[tuple[int, int]]:
    """Events with sizes in MiB."""
    return [(key, int(size * MIB)) for key, size in events]


def test_constants_are_those_of_the_installed_torch() -> None:
    header = Path(torch.__file__).parent / "include/c10/core/AllocatorConfig.h"
    found = dict(re.findall(r"constexpr size_t (k\w+) = (\d+);", header.read_text(encoding="utf-8")))
    names = {"kMinBlockSize": "ROUNDING", "kSmallSize": "SMALL_LIMIT", "kSmallBuffer": "SMALL_SEGMENT"}
    assert {ours: int(found[theirs]) for theirs, ours in names.items()} == {
        ours: getattr(allocator, ours) for ours in names.values()
    }


def test_sizes_are_rounded_to_512_bytes_and_nothing_takes_nothing() -> None:
    assert replay([(1, 1), (2, 513), (3, 0)]) == Replayed(1536, 2 * MIB, None)
    assert replay([(1, 0), (1, 0)]) == Replayed(0, 0, None)


@pytest.mark.parametrize(("size", "pages"), [(1, 2), (MIB, 2), (MIB + 1, 20), (20 * MIB, 20), (21 * MIB, 40)])
def test_expandable_segments_grow_by_pages(size: int, pages: int) -> None:
    assert replay([(1, size)]).peak_reserved == pages * MIB


def test_small_storages_share_a_segment() -> None:
    events = mib((1, 1), (2, 1), (3, 0.5))  # the third needs a second segment of 2 MiB
    assert replay(events[:2]).peak_reserved == 2 * MIB
    assert replay(events).peak_reserved == 4 * MIB


def test_the_block_of_a_freed_storage_is_used_again() -> None:
    events = mib((1, 40), (1, 0), (2, 40), (2, -1), (3, 40))
    assert replay(events) == Replayed(40 * MIB, 40 * MIB, None)


def test_a_remainder_of_512_bytes_is_split_off() -> None:
    assert replay([(1, 20 * MIB - 512)]).peak_allocated == 20 * MIB - 512
    assert replay(mib((1, 19), (2, 1.5))).peak_reserved == 40 * MIB
    assert replay(mib((1, 18.5), (2, 1.5))).peak_reserved == 20 * MIB


def test_the_best_fit_is_taken() -> None:
    """If the 8 MiB were taken from the block of 40, the next 40 would need two more pages."""
    events = mib((1, 40), (2, 5), (3, 10), (4, 5), (1, 0), (3, 0), (5, 8), (6, 40))
    assert replay(events).peak_reserved == 60 * MIB


def test_neighbours_are_merged_whatever_the_order_of_deaths() -> None:
    for order in ([1, 2, 3, 4], [4, 3, 2, 1], [1, 3, 2, 4], [2, 4, 1, 3]):
        events = mib(*((key, 5) for key in range(1, 5)), *((key, 0) for key in order), (9, 20))
        assert replay(events) == Replayed(20 * MIB, 20 * MIB, None), order


def test_unused_pages_are_given_back_when_the_device_is_full() -> None:
    """Free small pages become large ones, and a large page that is partly in use stays."""
    events = mib((1, 1), (1, 0), (2, 60))
    assert replay(events).peak_reserved == 62 * MIB
    assert replay(events, capacity=60 * MIB) == Replayed(60 * MIB, 60 * MIB, None)
    partly_used = mib((1, 25), (2, 5), (1, 0), (3, 60), (4, 1))
    assert replay(partly_used, capacity=81 * MIB).failed == 4
    assert replay(partly_used, capacity=82 * MIB).failed is None


def test_the_event_that_does_not_fit_is_named() -> None:
    events = mib((1, 40), (2, 40), (1, 0), (3, 60), (4, 1))
    assert replay(events, capacity=102 * MIB) == Replayed(101 * MIB, 102 * MIB, None)
    assert replay(events, capacity=100 * MIB).failed == 4
    assert replay(events, capacity=90 * MIB).failed == 3
    assert replay(events, capacity=60 * MIB) == Replayed(40 * MIB, 40 * MIB, 1)


def test_pages_in_the_middle_are_unmapped_and_filled_first() -> None:
    """Three blocks of 40 MiB, the middle one free: its pages are unmapped if needed, then mapped again."""
    allocator = Allocator(140 * MIB)
    blocks = [_allocate(allocator, 40 * MIB) for _ in range(3)]
    allocator.free(blocks[1])
    large = _allocate(allocator, 60 * MIB)  # not where 40 are free: at the end, for pages of the middle
    assert (large.address, allocator.reserved) == (120 * MIB, 140 * MIB)
    allocator.free(blocks[2])
    allocator.capacity = 180 * MIB
    again = _allocate(allocator, 70 * MIB)  # in the hole and the free block after it
    assert (again.address, allocator.reserved) == (40 * MIB, 180 * MIB)


def test_a_page_in_use_is_not_unmapped() -> None:
    allocator = Allocator(60 * MIB)
    first, second = _allocate(allocator, 25 * MIB), _allocate(allocator, 10 * MIB)
    allocator.free(first)  # of its two pages, the second holds `second`, too
    assert allocator.allocate(50 * MIB) is None
    assert allocator.reserved == 20 * MIB
    allocator.free(second)
    assert _allocate(allocator, 50 * MIB).address == 0


def test_least_capacity_is_where_the_replay_begins_to_succeed() -> None:
    assert least_capacity([]) == 0
    assert least_capacity(mib((1, 40), (1, 0), (2, 60))) == 64 * MIB


def test_a_storage_cannot_be_born_twice() -> None:
    with pytest.raises(ValueError, match="event 1: storage 7"):
        replay([(7, 1), (7, 2)])


def test_held_bytes_are_the_pages_that_contain_a_storage() -> None:
    allocator = Allocator()
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


@pytest.mark.parametrize("seed", range(6))
def test_invariants_hold_after_every_event(seed: int) -> None:
    events = _random_events(seed)
    capacity = least_capacity(events)
    allocator = Allocator(capacity)
    live: dict[int, Block] = {}
    for key, size in events:
        if size:
            live[key] = _allocate(allocator, size)
            assert live[key].size >= size
        else:
            allocator.free(live.pop(key))
        _check(allocator, list(live.values()))
    assert allocator.allocated == 0
    assert replay(events, capacity=capacity).failed is None
    assert replay(events, capacity=capacity - GRID).failed is not None


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
