"""Named tensors that outlive one operation: gradients, masters, optimizer state, layer inputs.

They live in the memory of one device. Some kinds can be offloaded to host RAM or to memory-mapped files; the
operating system writes mapped pages to disk and reads them back as it needs the memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from talik.base.files import need_room
from talik.base.system import reserve
from talik.model.weights.safetensors_file import tensor_bytes
from talik.recipe.plan import Tier
from talik.training.memory.keys import INPUT, Key


@runtime_checkable
class Scratch(Protocol):
    """Named tensors.

    A scratch may offload some kinds of tensors from the device that computes. Reading a key then returns the
    offloaded tensor: the caller copies it to the device.
    """

    def zeros(self, key: Key, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Returns the tensor of this name; creates it, filled with zeros, if there is none."""
        ...

    def __getitem__(self, key: Key) -> Tensor: ...
    def __setitem__(self, key: Key, tensor: Tensor) -> None: ...
    def __contains__(self, key: Key) -> bool: ...
    def drop(self, key: Key) -> None:
        """Removes a tensor if there is one of this name."""
        ...

    def values(self) -> Iterable[Tensor]:
        """The tensors in the device's memory."""
        ...


class MemoryScratch:
    """Tensors in the memory of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[Key, Tensor] = {}

    def zeros(self, key: Key, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if key not in self._tensors:
            self._tensors[key] = torch.zeros(shape, dtype=dtype, device=self._device)
        return self._tensors[key]

    def __getitem__(self, key: Key) -> Tensor:
        return self._tensors[key]

    def __setitem__(self, key: Key, tensor: Tensor) -> None:
        self._tensors[key] = tensor

    def __contains__(self, key: Key) -> bool:
        return key in self._tensors

    def drop(self, key: Key) -> None:
        self._tensors.pop(key, None)

    def values(self) -> Iterable[Tensor]:
        return self._tensors.values()


class TieredScratch(MemoryScratch):
    """Tensors in the device's memory, except for the kinds that are offloaded to host RAM or to files.

    Files are mapped and changed in place. Their disk space is allocated when they are created (NoRoomError,
    OSError). The storage of a dropped tensor is reused by the next tensor of the same name, except for layer
    inputs: their size differs in each step, so they free their storage.

    Args:
        device: The device that computes.
        folder: Holds the files; created when the first one is.
        tier: Returns where tensors of a kind are stored.
    """

    def __init__(self, device: torch.device, folder: Path, tier: Callable[[str], Tier]) -> None:
        super().__init__(device)
        self._folder, self._tier_of = folder, tier
        self._storage: dict[Key, Tensor] = {}  # the bytes of offloaded tensors

    def zeros(self, key: Key, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if key not in self and self._offloaded(key):
            reused = key in self._storage  # new storage holds zeros and need not be written
            view = self._view(key, shape, dtype)
            self._tensors[key] = view.zero_() if reused else view
        return super().zeros(key, shape, dtype)

    def __setitem__(self, key: Key, tensor: Tensor) -> None:
        if self._offloaded(key):
            view = self._view(key, tensor.shape, tensor.dtype)
            self._write(key, view, tensor)
            tensor = view
        elif self._is_offloaded_storage(tensor):
            # Copy it: computing in a mapped file would write its pages to disk again and again.
            tensor = tensor.to(self._device, copy=True)
        super().__setitem__(key, tensor)

    def drop(self, key: Key) -> None:
        super().drop(key)
        if key.kind == INPUT:
            self._free_storage(key)

    def values(self) -> Iterable[Tensor]:
        return [tensor for key, tensor in self._tensors.items() if not self._offloaded(key)]

    def close(self) -> None:
        """Removes the files."""
        self._tensors.clear()
        self._storage.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tier(self, key: Key) -> Tier:
        return self._tier_of(key.kind)

    def _offloaded(self, key: Key) -> bool:
        return self._tier(key) != "memory"

    def _is_offloaded_storage(self, tensor: Tensor) -> bool:
        return any(tensor is own for key, own in self._tensors.items() if self._offloaded(key))

    def _view(self, key: Key, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A view of the offloaded storage of a key; storage that is too small is replaced."""
        size = shape.numel() * dtype.itemsize
        if key not in self._storage or self._storage[key].nbytes < size:
            self._free_storage(key)
            self._storage[key] = self._make(key, size)
        return self._storage[key][:size].view(dtype).view(shape)

    def _file(self, key: Key) -> Path:
        return self._folder / str(key)

    def _free_storage(self, key: Key) -> None:
        """Frees the offloaded storage of a key, the mapping before the file.

        Windows cannot delete a file that is mapped.
        """
        if self._storage.pop(key, None) is not None and self._tier(key) == "disk":
            self._file(key).unlink(missing_ok=True)

    def _write(self, key: Key, view: Tensor, tensor: Tensor) -> None:
        """Fills offloaded storage. Writing to the file is several times as fast as to its mapped pages."""
        if self._tier(key) == "ram":
            view.copy_(tensor)
            return
        with self._file(key).open("r+b") as file:
            file.write(tensor_bytes(tensor))

    def _make(self, key: Key, size: int) -> Tensor:
        """Allocates offloaded storage of `size` bytes, all zero."""
        if self._tier(key) == "ram":
            return torch.zeros(size, dtype=torch.uint8)
        path = self._file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        need_room(path, size, "optimizer state and layer inputs")
        with path.open("xb", buffering=0) as file:
            reserve(file.fileno(), size)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
