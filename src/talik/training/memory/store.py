"""Stores: they load blocks of weights onto a device for the step and the trunk, and release them again.

`get` loads a block, so that its parameters can be computed with; `put` reports that they were changed;
`release` frees the block; `read_ahead` names the block that will be needed next.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from talik.model.block import Block
from talik.training.memory.reader import BlockReader, BlockWeights, Buffer, Traffic


@runtime_checkable
class Store(Protocol):
    """Provides the weights of blocks."""

    def get(self, block: Block) -> None: ...
    def put(self, block: Block) -> None: ...
    def read_ahead(self, block: Block) -> None: ...
    def release(self, block: Block) -> None: ...


class ResidentStore:
    """A store for a model whose parameters are all in memory: every method is a no-op."""

    def get(self, block: Block) -> None:
        pass

    def put(self, block: Block) -> None:
        pass

    def read_ahead(self, block: Block) -> None:
        pass

    def release(self, block: Block) -> None:
        pass


class Residency(Enum):
    """The state of a block in a `FileStore`."""

    AWAY = "only in the files"
    READING = "being read ahead into a buffer"
    LOADED = "in memory until it is released"
    PINNED = "in memory as long as the store exists"


@dataclass(slots=True)
class BlockState:
    """The state of one block; a streamed block that is being read or loaded has a buffer."""

    residency: Residency = Residency.AWAY
    buffer: Buffer | None = None
    reading: Future[dict[str, Tensor]] | None = None


@dataclass(slots=True)
class _LoadedTensor:
    """A tensor in memory of its own, and the loaded blocks that contain it (several for tied tensors)."""

    tensor: Tensor
    blocks: set[Block] = field(default_factory=set[Block])


class FileStore:
    """Blocks of a hollow model, read from the files of its checkpoint.

    Streamed blocks share a few buffers, each as large as the largest of them: one block is computed with
    while a thread reads the next. Every other block is loaded by `get` into memory of its own and stays until
    `release`. The same thread writes changed blocks to the working copy of the weights, from which they are
    read afterwards. A pinned block is never written: it exists in memory only.

    Args:
        weights: The weights of the model.
        device: The device that computes.
        streamed: The blocks that share the buffers.
        executor: Runs all reading and writing, in order; a thread of the store's own by default.
        buffers: The number of buffers.
    """

    def __init__(
        self,
        weights: BlockWeights,
        device: torch.device,
        streamed: Collection[Block] = (),
        executor: Executor | None = None,
        buffers: int = 2,
    ) -> None:
        self._weights = weights
        self._streamed = frozenset(streamed)
        self._reader = BlockReader(weights, device, executor)
        self._buffer_size = max((weights.size(weights.names(block)) for block in streamed), default=0)
        self._buffers = buffers
        self._free_buffers: list[Buffer] = []
        self._states: dict[Block, BlockState] = {}
        self._loaded: dict[int, _LoadedTensor] = {}  # by the id of the hollow tensor, which tied names share
        self._writes: list[Future[None]] = []

    @property
    def traffic(self) -> Traffic:
        """Bytes that were read and written so far, and the time it took."""
        return self._reader.traffic

    def get(self, block: Block) -> None:
        """Loads a block; waits for the reader.

        Raises:
            SourceError: The block cannot be read.
            OSError: An earlier write to the working copy failed.
        """
        state, streamed = self._state(block), block in self._streamed
        if state.residency == Residency.PINNED or (streamed and state.residency == Residency.LOADED):
            return
        self._raise_failed_writes(wait_for_all=not streamed)
        if streamed:
            self._get_streamed(block, state)
            return
        self._free_buffers.clear()  # embeddings or head may be as large as all buffers together
        self._load(block)
        state.residency = Residency.LOADED

    def pin(self, block: Block) -> None:
        """Loads a block for as long as the store exists: `release` does not free it."""
        if self._state(block).buffer is not None:
            self.release(block)
        self._load(block)
        self._state(block).residency = Residency.PINNED

    def put(self, block: Block) -> None:
        """Writes the trained tensors of a block: a streamed block in the background, another at once."""
        if self._state(block).residency == Residency.PINNED:
            return
        future = self._reader.write(self._weights.to_write(block))
        self._writes.append(future)
        if block not in self._streamed:
            future.result()  # its memory is needed for other blocks

    def read_ahead(self, block: Block) -> None:
        """Begins to read a streamed block if a buffer is free; otherwise `get` will read it."""
        state = self._state(block)
        if block not in self._streamed or state.residency != Residency.AWAY:
            return
        if (buffer := self._take_buffer()) is not None:
            state.buffer = buffer
            state.reading = self._reader.read(block, buffer)
            state.residency = Residency.READING

    def release(self, block: Block) -> None:
        """Makes a block hollow again and frees its memory."""
        state = self._state(block)
        if state.residency in (Residency.AWAY, Residency.PINNED):
            return
        if state.reading is not None:
            wait([state.reading])
        if state.buffer is not None:
            self._return_buffer(state)
        self._states[block] = BlockState()
        self._weights.remove(block)
        for key in {id(self._weights.hollow(name)) for name in self._weights.names(block)}:
            if (loaded := self._loaded.get(key)) is not None:
                loaded.blocks.discard(block)
                if not loaded.blocks:
                    del self._loaded[key]

    def drop_buffers(self) -> None:
        """Releases all streamed blocks and frees the buffers; other loaded blocks stay."""
        self._raise_failed_writes(wait_for_all=True)
        for block in [block for block, state in self._states.items() if state.buffer is not None]:
            self.release(block)
        self._free_buffers.clear()

    def residency(self, block: Block) -> Residency:
        """The state of a block."""
        return self._state(block).residency

    def _state(self, block: Block) -> BlockState:
        return self._states.setdefault(block, BlockState())

    def _get_streamed(self, block: Block, state: BlockState) -> None:
        if state.residency == Residency.AWAY:
            self.read_ahead(block)
        assert state.reading is not None, "more streamed blocks are in use than there are buffers"
        start = time.perf_counter()
        try:
            tensors = state.reading.result()
        except BaseException:
            self._return_buffer(state)
            self._states[block] = BlockState()
            raise
        self.traffic.waited += time.perf_counter() - start
        self._weights.place(tensors)
        state.residency, state.reading = Residency.LOADED, None

    def _load(self, block: Block) -> None:
        """Loads the tensors that no other block has loaded; tied tensors are loaded once."""
        start = time.perf_counter()
        names = {id(self._weights.hollow(name)): name for name in self._weights.names(block)}
        for key, name in names.items():
            if key not in self._loaded:
                self._loaded[key] = _LoadedTensor(self._reader.load(name).result())
            self._loaded[key].blocks.add(block)
        self._weights.place(
            {name: self._loaded[id(self._weights.hollow(name))].tensor for name in self._weights.names(block)}
        )
        self.traffic.waited += time.perf_counter() - start

    def _take_buffer(self) -> Buffer | None:
        """A free buffer, a new one while there are fewer than allowed, or None."""
        if self._free_buffers:
            return self._free_buffers.pop()
        in_use = sum(state.buffer is not None for state in self._states.values())
        return self._reader.new_buffer(self._buffer_size) if in_use < self._buffers else None

    def _return_buffer(self, state: BlockState) -> None:
        assert state.buffer is not None
        state.buffer.free = self._reader.queued_work()
        self._free_buffers.append(state.buffer)

    def _raise_failed_writes(self, *, wait_for_all: bool = False) -> None:
        """Raises the error of a write that has ended."""
        while self._writes and (wait_for_all or self._writes[0].done()):
            self._writes.pop(0).result()
