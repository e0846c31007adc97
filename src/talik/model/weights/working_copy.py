"""The working copy: a file of the run with the trained tensors that are not in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from talik.base.files import need_room
from talik.base.system import drop_pages, reserve
from talik.model.weights.safetensors_file import Entry, read_header, tensor_bytes


@runtime_checkable
class Overlay(Protocol):
    """Tensors that are read in place of those of the checkpoint, by the model's names."""

    def __contains__(self, name: str, /) -> bool: ...
    def covers(self, name: str) -> bool: ...
    def read(self, name: str, into: Tensor) -> None: ...


@runtime_checkable
class WritableOverlay(Overlay, Protocol):
    """An overlay to which changed tensors can be written."""

    def write(self, name: str, tensor: Tensor) -> None: ...


class SavedWeights:
    """Tensors of a safetensors file, by the model's names, in place of those of the checkpoint."""

    def __init__(self, file: Path) -> None:
        self._table = read_header(file)

    def __contains__(self, name: str) -> bool:
        """True if a tensor is read from here."""
        return name in self._table

    def covers(self, name: str) -> bool:
        """True if a tensor may be written here."""
        return False

    def read(self, name: str, into: Tensor) -> None:
        """Fills a contiguous CPU tensor."""
        self._table[name].read_into(tensor_bytes(into))


class WorkingCopy:
    """Tensors by name in one file, each in the model's dtype.

    Disk space is allocated at once, so that no step fails for lack of it.

    Args:
        file: The file.
        sizes: Bytes of each tensor.
        saved: Initial values of tensors that have not been written; without it those of the checkpoint.
        forget: Drop written pages from the page cache.

    Raises:
        NoRoomError: The disk has too little room.
    """

    def __init__(
        self, file: Path, sizes: Mapping[str, int], saved: SavedWeights | None = None, *, forget: bool = False
    ) -> None:
        self._saved = saved
        self._table: dict[str, Entry] = {}
        end = 0
        for name, size in sizes.items():
            self._table[name] = Entry(file, torch.uint8, (size,), end, size)
            end += size
        file.parent.mkdir(parents=True, exist_ok=True)
        need_room(file, end, "the working copy of the weights")
        self._path, self._forget = file, forget
        self._file = file.open("w+b", buffering=0)
        reserve(self._file.fileno(), end)
        self._written: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """True if a tensor is read from here."""
        return name in self._written or (self._saved is not None and name in self._saved)

    def covers(self, name: str) -> bool:
        """True if a tensor may be written here."""
        return name in self._table

    def read(self, name: str, into: Tensor) -> None:
        """Fills a contiguous CPU tensor."""
        if name not in self._written and self._saved is not None:
            self._saved.read(name, into)
            return
        self._table[name].read_into(tensor_bytes(into), forget=self._forget)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor in its place."""
        self._file.seek(self._table[name].start)
        place, done = tensor_bytes(tensor), 0
        while done < len(place):
            done += self._file.write(place[done:])
        if self._forget:  # pages that are not on disk yet cannot be dropped
            os.fsync(self._file.fileno())
            drop_pages(self._file.fileno(), self._table[name].start, len(place))
        self._written.add(name)

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)
