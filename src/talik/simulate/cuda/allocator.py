"""Replays PyTorch's caching allocator for CUDA over a log of storages.

The rules are those of DeviceCachingAllocator in c10/cuda/CUDACachingAllocator.cpp, for one device and one
stream, without options of PYTORCH_CUDA_ALLOC_CONF other than expandable_segments. Not modelled: streams and
record_stream, max_split_size, garbage collection, rounding to powers of two, private pools of CUDA graphs,
the limit of 9/8 of the device's memory on the addresses of one expandable segment. Compared with the source,
not yet with a device.

The memory that a device must have is `least_capacity`, not `Replayed.peak_reserved`: with memory to spare the
allocator keeps segments that it would release under pressure.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MIB = 1 << 20

# c10/core/AllocatorConfig.h, torch 2.13 (formerly in CUDACachingAllocator.cpp, with the same values)
ROUNDING = 512  # kMinBlockSize: the size of every block is a multiple
SMALL_LIMIT = 1 * MIB  # kSmallSize: largest size of the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer: a page of the small pool
LARGE_SEGMENT = 20 * MIB  # large_segment_size(): a page of the large pool
PAGES = 1 << 32  # addresses of an expandable segment: no limit in this model
GRID = 16 * MIB  # of `least_capacity`


@dataclass(frozen=True, slots=True)
class Replayed:
    """The effect of a log of storages on the allocator.

    Attributes:
        peak_allocated: Bytes of blocks in use, each rounded, at their peak:
            torch.cuda.max_memory_allocated().
        peak_reserved: Bytes taken from the device at their peak: torch.cuda.max_memory_reserved().
        failed: Index of the event that did not fit the capacity, where the replay ended; None if all fitted.
    """

    peak_allocated: int
    peak_reserved: int
    failed: int | None


def replay(events: Sequence[tuple[int, int]], *, capacity: int | None = None) -> Replayed:
    """Replays events on a device.

    Args:
        events: (key, bytes): the storage `key` is born with bytes > 0 and dies with bytes <= 0. Empty
            storages take no memory.
        capacity: Bytes for the allocator; None for no limit.

    Raises:
        ValueError: A key is born while it is alive.
    """
    allocator = Allocator(capacity)
    done = sum(1 for _ in follow(events, allocator))
    failed = done if done < len(events) else None
    return Replayed(allocator.peak_allocated, allocator.peak_reserved, failed)


def follow(events: Sequence[tuple[int, int]], allocator: Allocator) -> Iterator[int]:
    """Replays one event after another and yields its index; ends before one that does not fit."""
    live: dict[int, Block] = {}
    for index, (key, size) in enumerate(events):
        if size <= 0:
            if block := live.pop(key, None):
                allocator.free(block)
        elif key in live:
            raise ValueError(f"event {index}: storage {key} is born while it lives")
        elif block := allocator.allocate(size):
            live[key] = block
        else:
            return
        yield index


def least_capacity(events: Sequence[tuple[int, int]]) -> int:
    """Bytes that a device must have for the allocator so that every storage fits, a multiple of 16 MiB.

    Found by bisection: this capacity suffices, and 16 MiB less does not.
    """
    unlimited = replay(events)
    enough = -(-unlimited.peak_reserved // GRID)
    too_little = -(-unlimited.peak_allocated // GRID) - 1
    while enough - too_little > 1:
        middle = (enough + too_little) // 2
        if replay(events, capacity=middle * GRID).failed is None:
            enough = middle
        else:
            too_little = middle
    return enough * GRID


class Block(NamedTuple):
    """A range of addresses for storages of one pool; a hole if no memory is mapped there."""

    pool: Pool
    address: int
    size: int
    mapped: bool = True

    @property
    def end(self) -> int:
        return self.address + self.size

    @property
    def pages(self) -> tuple[int, int]:
        """Start and end of the whole pages in the range; without any, the end is not above the start."""
        return _up(self.address, self.pool.segment), self.end // self.pool.segment * self.pool.segment


class Pool:
    """The unused blocks for small or large storages: those with memory by size, holes by address.

    Args:
        segment: Bytes of a page.
    """

    def __init__(self, segment: int) -> None:
        self.segment = segment
        self.free: list[tuple[int, int]] = []  # (size, address): the best fit is the first large enough
        self.holes: list[int] = []
        self.starts: dict[int, Block] = {}
        self.ends: dict[int, Block] = {}
        self.idle = 0  # bytes of mapped whole pages that are empty

    def add(self, block: Block) -> None:
        self.starts[block.address] = self.ends[block.end] = block
        if block.mapped:
            insort(self.free, (block.size, block.address))
            self.idle += _whole(block)
        else:
            insort(self.holes, block.address)

    def remove(self, block: Block) -> None:
        del self.starts[block.address], self.ends[block.end]
        if block.mapped:
            del self.free[bisect_left(self.free, (block.size, block.address))]
            self.idle -= _whole(block)
        else:
            del self.holes[bisect_left(self.holes, block.address)]

    def add_merged(self, block: Block) -> Block:
        """Adds a block, merged with its unused neighbours; a hole is merged with holes."""
        for other in (self.ends.get(block.address), self.starts.get(block.end)):
            if other and other.mapped == block.mapped:
                self.remove(other)
                start = min(block.address, other.address)
                block = Block(self, start, block.size + other.size, block.mapped)
        self.add(block)
        return block


class Allocator:
    """One segment per pool, which grows by pages and, under pressure, gives wholly unused ones back."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.small, self.large = Pool(SMALL_SEGMENT), Pool(LARGE_SEGMENT)
        for pool in (self.small, self.large):
            pool.add(Block(pool, 0, pool.segment * PAGES, mapped=False))

    @property
    def held(self) -> int:
        """Bytes that cannot be returned: all pages that hold something."""
        return self.reserved - self.small.idle - self.large.idle

    def allocate(self, size: int) -> Block | None:
        """A block for a storage of this size; None if it does not fit."""
        size = _up(size, ROUNDING)
        pool = self.small if size <= SMALL_LIMIT else self.large
        block = self._cached(pool, size) or self._new(pool, size)
        if block is None:
            self._release(self.large)
            self._release(self.small)
            if not (block := self._new(pool, size)):
                return None
        if block.size - size >= ROUNDING:  # should_split
            pool.add(Block(pool, block.address + size, block.size - size))
            block = Block(pool, block.address, size)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Frees a storage; its block is cached."""
        block.pool.add_merged(block)
        self.allocated -= block.size

    def _cached(self, pool: Pool, size: int) -> Block | None:
        """Takes the best fit; a block counts with the hole into which it can grow (get_free_block)."""
        best = None
        for _, address in pool.free[bisect_left(pool.free, (size, 0)) :]:
            block = pool.starts[address]
            if best and _growable(block) >= _growable(best):
                break
            best = block
        if best:
            pool.remove(best)
        return best

    def pages_for(self, size: int) -> int:
        """Bytes of the pages that a storage takes if no other page has room for it."""
        return _up(size, SMALL_SEGMENT if _up(size, ROUNDING) <= SMALL_LIMIT else LARGE_SEGMENT)

    def _reserve(self, size: int) -> bool:
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _new(self, pool: Pool, size: int) -> Block | None:
        """Maps pages at the lowest address with room (try_allocate_expandable_block)."""
        block = self._room(pool, size)
        while not block.mapped or block.size < size:
            hole, missing = (pool.starts[block.end], size - block.size) if block.mapped else (block, size)
            pages = min(_up(missing, pool.segment), hole.size)
            if not self._reserve(pages):
                return None
            block = self._map(hole, pages)
        pool.remove(block)
        return block

    def _room(self, pool: Pool, size: int) -> Block:
        """The first of consecutive unused blocks and holes that together have `size` bytes."""
        for hole in (pool.starts[address] for address in pool.holes):
            first = pool.ends.get(hole.address, hole)
            room, block = 0, first
            while block and room < size:
                room, block = room + block.size, pool.starts.get(block.end)
            if room >= size:
                return first
        raise AssertionError("the last hole is larger than any device")

    def _map(self, hole: Block, size: int) -> Block:
        hole.pool.remove(hole)
        if size < hole.size:
            hole.pool.add(Block(hole.pool, hole.address + size, hole.size - size, mapped=False))
        return hole.pool.add_merged(Block(hole.pool, hole.address, size))

    def _release(self, pool: Pool) -> None:
        for block in [pool.starts[address] for _, address in pool.free]:
            start, end = block.pages
            if start < end:
                self._unmap(block, start, end)

    def _unmap(self, block: Block, start: int, end: int) -> None:
        """Turns whole pages of a free block into a hole; the rest stays free."""
        pool = block.pool
        pool.remove(block)
        if block.address < start:
            pool.add(Block(pool, block.address, start - block.address))
        if end < block.end:
            pool.add(Block(pool, end, block.end - end))
        pool.add_merged(Block(pool, start, end - start, mapped=False))
        self.reserved -= end - start


def _growable(block: Block) -> int:
    after = block.pool.starts.get(block.end)
    return block.size + (after.size if after and not after.mapped else 0)


def _whole(block: Block) -> int:
    start, end = block.pages
    return max(0, end - start)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
