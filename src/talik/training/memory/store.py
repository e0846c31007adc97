"""Blocks of weights in and out of a device. The step and the trunk ask a store for every block they touch.

A block is named "embeddings", "layer 17", "tail" or "rest". After `get` the block's parameters may be
computed with; `release` ends that; `put` says that they were changed; `read_ahead` says which block is next.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from talik.model.weights.weights import Weights
from talik.model.weights.working_copy import WorkingCopy

STREAMS = ("cuda", "xpu")  # devices that copy from pinned memory beside what they compute


@runtime_checkable
class Store(Protocol):
    """Where a block's weights come from."""

    def get(self, block: str) -> None: ...
    def put(self, block: str) -> None: ...
    def read_ahead(self, block: str) -> None: ...
    def release(self, block: str) -> None: ...


class ResidentStore:
    """The model's own parameters, which stay where they are: nothing moves."""

    def get(self, block: str) -> None:
        pass

    def put(self, block: str) -> None:
        pass

    def read_ahead(self, block: str) -> None:
        pass

    def release(self, block: str) -> None:
        pass


@dataclass(slots=True)
class Traffic:
    """What a store has read and written, in bytes of the files, and the seconds that it took.

    `waited`: those in which somebody waited for a block; `writing`: those of the writes.
    """

    bytes: int = 0
    waited: float = 0.0
    written: int = 0
    writing: float = 0.0


@dataclass(slots=True)
class _Slot:
    """Memory for one streamed block: on the device, and pinned beside it where that is an accelerator."""

    device: Tensor
    host: Tensor
    free: torch.Event | None


class FileStore:
    """Blocks of a hollow model, read from the files of its checkpoint.

    The `streamed` ones take turns in `buffers`, each of the size of the largest: one is computed with while
    a thread reads the next. Every other block is loaded by `get` and stays until `release`. What changed is
    written to the weights' working copy by the same thread, so that it is read back as it was put; what
    stays in memory is nowhere else.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        streamed: Collection[str] = (),
        reader: Executor | None = None,
        buffers: int = 2,
    ) -> None:
        self.traffic = Traffic()
        self._buffers = buffers
        self._weights, self._device = weights, device
        self._streamed = frozenset(streamed)
        self._largest = max((weights.size(weights.names(block)) for block in streamed), default=0)
        self._slots: list[_Slot] = []
        self._in_use: dict[str, _Slot] = {}
        self._coming: dict[str, Future[dict[str, Tensor]]] = {}
        self._going: list[Future[None]] = []
        self._kept: dict[int, Tensor] = {}
        self._users: dict[int, set[str]] = {}
        self._staying: set[str] = set()
        self._reader = reader or ThreadPoolExecutor(1, thread_name_prefix="talik-reader")
        self._stream = torch.Stream(device) if device.type in STREAMS else None

    def get(self, block: str) -> None:
        """The block's parameters become real. Waits for the reader."""
        if block in self._staying or (block in self._in_use and block not in self._coming):
            return
        self._settle(wait_for_all=block not in self._streamed)
        if block not in self._streamed:
            self._slots.clear()  # what is apart from the layers takes as much as they do
            self._keep(block)
            return
        if block not in self._coming:
            self.read_ahead(block)
        start = time.perf_counter()
        tensors = self._coming.pop(block).result()
        self.traffic.waited += time.perf_counter() - start
        self._weights.place(tensors)

    def stay(self, block: str) -> None:
        """Gets a block for as long as the store is there: `release` leaves it."""
        self._keep(block)
        self._staying.add(block)

    def put(self, block: str) -> None:
        """Writes what is trained of a block; a streamed one while others are computed with."""
        if block in self._staying:
            return
        future = self._reader.submit(self._write, self._weights.to_write(block))
        self._going.append(future)
        if block not in self._streamed:
            future.result()  # its memory is wanted for others

    def read_ahead(self, block: str) -> None:
        """Begins to read a streamed block, if a buffer is free for it; `get` does so otherwise."""
        streamed = block in self._streamed and block not in self._staying
        if streamed and block not in self._in_use and (slot := self._free_slot()):
            self._in_use[block] = slot
            self._coming[block] = self._reader.submit(self._read, block, slot)

    def release(self, block: str) -> None:
        """The block is hollow again, and its memory free for another."""
        if block in self._staying:
            return
        if block in self._streamed:
            slot = self._in_use.pop(block)
            slot.free = self._queued()
            self._slots.append(slot)
        self._weights.remove(block)
        for key in {id(self._weights.hollow(name)) for name in self._weights.names(block)}:
            self._users.get(key, set()).discard(block)
            if not self._users.get(key):
                self._kept.pop(key, None)

    def drop_buffers(self) -> None:
        """Gives the buffers of streamed blocks back; what was got without being streamed stays."""
        self._settle(wait_for_all=True)
        for block in list(self._in_use):
            if coming := self._coming.pop(block, None):
                wait([coming])
            self.release(block)
        self._slots.clear()

    def _free_slot(self) -> _Slot | None:
        if self._slots:
            return self._slots.pop()
        if len(self._in_use) >= self._buffers:
            return None
        host = torch.empty(self._largest, dtype=torch.uint8, pin_memory=self._stream is not None)
        on_cpu = self._device.type == "cpu"
        return _Slot(host if on_cpu else torch.empty_like(host, device=self._device), host, self._queued())

    def _queued(self) -> torch.Event | None:
        """Comes when what is queued on the device is done: until then it may use a buffer's memory."""
        if self._stream is None:
            return None
        event = torch.Event(self._device)
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def _read(self, block: str, slot: _Slot) -> dict[str, Tensor]:
        """In the reader's thread: from the files to the device."""
        names = self._weights.names(block)
        tensors = self._weights.read(names, slot.host)
        self.traffic.bytes += self._weights.bytes_in_files(names)
        if slot.device is slot.host:
            return tensors
        if self._stream is None:
            slot.device.copy_(slot.host)
        else:
            if slot.free is not None:
                slot.free.synchronize()
            with self._stream:
                slot.device.copy_(slot.host, non_blocking=True)
            self._stream.synchronize()
        return {name: _same_place(tensor, slot) for name, tensor in tensors.items()}

    def _write(self, tensors: dict[str, Tensor]) -> None:
        """In the reader's thread: to the working copy."""
        copy = self._weights.changed
        start = time.perf_counter()
        for name, tensor in tensors.items():
            assert isinstance(copy, WorkingCopy)  # nothing else covers a name
            copy.write(name, tensor)
            self.traffic.written += tensor.nbytes
        self.traffic.writing += time.perf_counter() - start

    def _settle(self, *, wait_for_all: bool = False) -> None:
        """Raises what went wrong in a write that has ended."""
        while self._going and (wait_for_all or self._going[0].done()):
            self._going.pop(0).result()

    def _keep(self, block: str) -> None:
        """Loads what no block has loaded yet; tied tensors are loaded once."""
        start = time.perf_counter()
        names = {id(self._weights.hollow(name)): name for name in self._weights.names(block)}
        for key, name in names.items():
            if key not in self._kept:
                self._kept[key] = self._reader.submit(self._load, name).result()
            self._users.setdefault(key, set()).add(block)
        self._weights.place(
            {name: self._kept[id(self._weights.hollow(name))] for name in self._weights.names(block)}
        )
        self.traffic.waited += time.perf_counter() - start

    def _load(self, name: str) -> Tensor:
        """In the reader's thread, as all reading: one tensor in memory of its own on the device."""
        hollow = self._weights.hollow(name)
        buffer = torch.empty(self._weights.size([name]), dtype=torch.uint8)
        tensor = self._weights.read([name], buffer)[name].to(self._device)
        self.traffic.bytes += self._weights.bytes_in_files([name])
        return nn.Parameter(tensor, hollow.requires_grad) if isinstance(hollow, nn.Parameter) else tensor


def _same_place(tensor: Tensor, slot: _Slot) -> Tensor:
    """The view of the device's buffer that this is of the host's."""
    start = tensor.data_ptr() - slot.host.data_ptr()
    return slot.device[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
