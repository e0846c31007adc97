"""Reads and writes blocks of weights in one background thread."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from talik.model.block import Block
from talik.model.weights.working_copy import Overlay, WritableOverlay

STREAMS = ("cuda", "xpu")  # devices that can copy from pinned memory while they compute


@runtime_checkable
class BlockWeights(Protocol):
    """The weights of a hollow model, by block, as `talik.model.weights.weights.Weights` reads them."""

    @property
    def changed(self) -> Overlay | None: ...
    def names(self, block: Block) -> list[str]: ...
    def hollow(self, name: str) -> Tensor: ...
    def size(self, names: Iterable[str]) -> int: ...
    def bytes_in_files(self, names: Iterable[str]) -> int: ...
    def read(self, names: Iterable[str], buffer: Tensor) -> dict[str, Tensor]: ...
    def to_write(self, block: Block) -> dict[str, Tensor]: ...
    def place(self, tensors: dict[str, Tensor]) -> None: ...
    def remove(self, block: Block) -> None: ...


@dataclass(slots=True)
class Traffic:
    """Counts what a store has read and written.

    Attributes:
        bytes: Bytes read from the files.
        waited: Seconds in which the caller waited for a block.
        written: Bytes written to the working copy.
        writing: Seconds that the writes took.
    """

    bytes: int = 0
    waited: float = 0.0
    written: int = 0
    writing: float = 0.0


@dataclass(slots=True)
class Buffer:
    """Memory for one streamed block.

    Attributes:
        device: Bytes on the device.
        host: Bytes in host RAM that are read into (pinned for an accelerator); the same tensor on a CPU.
        free: An event after which the device no longer reads the buffer's last block.
    """

    device: Tensor
    host: Tensor
    free: torch.Event | None


class BlockReader:
    """Moves blocks between the files and the device. All work runs in one thread, in the order of the calls.

    Args:
        weights: The weights of the model.
        device: The device that computes.
        executor: Runs the work in place of a thread of the reader's own.
    """

    def __init__(self, weights: BlockWeights, device: torch.device, executor: Executor | None = None) -> None:
        self.traffic = Traffic()
        self._weights, self._device = weights, device
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="talik-reader")
        self._stream = torch.Stream(device) if device.type in STREAMS else None

    def new_buffer(self, size: int) -> Buffer:
        """Allocates a buffer of `size` bytes."""
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
        on_cpu = self._device.type == "cpu"
        device = host if on_cpu else torch.empty_like(host, device=self._device)
        return Buffer(device, host, self.queued_work())

    def queued_work(self) -> torch.Event | None:
        """An event that comes when the work now queued on the device is done: it may still read a buffer."""
        if self._stream is None:
            return None
        event = torch.Event(self._device)
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def read(self, block: Block, buffer: Buffer) -> Future[dict[str, Tensor]]:
        """Reads a block into a buffer; the result maps names to views of the buffer on the device."""
        return self._executor.submit(self._read, block, buffer)

    def load(self, name: str) -> Future[Tensor]:
        """Reads one tensor into memory of its own on the device."""
        return self._executor.submit(self._load, name)

    def write(self, tensors: dict[str, Tensor]) -> Future[None]:
        """Writes tensors to the working copy."""
        return self._executor.submit(self._write, tensors)

    def _read(self, block: Block, buffer: Buffer) -> dict[str, Tensor]:
        names = self._weights.names(block)
        tensors = self._weights.read(names, buffer.host)
        self.traffic.bytes += self._weights.bytes_in_files(names)
        if buffer.device is buffer.host:
            return tensors
        if self._stream is None:
            buffer.device.copy_(buffer.host)
        else:
            if buffer.free is not None:
                buffer.free.synchronize()
            with self._stream:
                buffer.device.copy_(buffer.host, non_blocking=True)
            self._stream.synchronize()
        return {name: _on_device(tensor, buffer) for name, tensor in tensors.items()}

    def _load(self, name: str) -> Tensor:
        hollow = self._weights.hollow(name)
        buffer = torch.empty(self._weights.size([name]), dtype=torch.uint8)
        tensor = self._weights.read([name], buffer)[name].to(self._device)
        self.traffic.bytes += self._weights.bytes_in_files([name])
        return nn.Parameter(tensor, hollow.requires_grad) if isinstance(hollow, nn.Parameter) else tensor

    def _write(self, tensors: dict[str, Tensor]) -> None:
        copy = self._weights.changed
        start = time.perf_counter()
        for name, tensor in tensors.items():
            assert isinstance(copy, WritableOverlay)  # `to_write` returns only tensors that it covers
            copy.write(name, tensor)
            self.traffic.written += tensor.nbytes
        self.traffic.writing += time.perf_counter() - start


def _on_device(tensor: Tensor, buffer: Buffer) -> Tensor:
    """The view of the device's buffer at the place where `tensor` is a view of the host's."""
    start = tensor.data_ptr() - buffer.host.data_ptr()
    return buffer.device[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
