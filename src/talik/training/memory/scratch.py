"""Named tensors that outlive one operation: gradients, masters, optimizer state, what goes into a layer.

In the memory of one device; or some kinds of them in the RAM beside it, or in files that are mapped: the
system writes those out and reads them back as it needs the memory.
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


@runtime_checkable
class Scratch(Protocol):
    """Named tensors. `zeros` makes one if it is not there yet; `drop` forgets one.

    Of a name the part before the first / is its kind. Kinds may be kept apart from the device that computes:
    what is asked for is where it is kept. `values` are the tensors in the device's memory.
    """

    def zeros(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor: ...
    def __getitem__(self, name: str) -> Tensor: ...
    def __setitem__(self, name: str, tensor: Tensor) -> None: ...
    def __contains__(self, name: str) -> bool: ...
    def drop(self, name: str) -> None: ...
    def values(self) -> Iterable[Tensor]: ...


class MemoryScratch:
    """Tensors in the memory of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[str, Tensor] = {}

    def zeros(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = torch.zeros(shape, dtype=dtype, device=self._device)
        return self._tensors[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def drop(self, name: str) -> None:
        self._tensors.pop(name, None)

    def values(self) -> Iterable[Tensor]:
        return self._tensors.values()


class TieredScratch(MemoryScratch):
    """Tensors in the device's memory, but those of some kinds in RAM beside it or in a folder of files.

    `tier` says of a kind where it is kept. A file is mapped and changed in place; its room is taken when it
    is made (NoRoomError, OSError). Where a tensor was that is dropped, the next of its name will be; but what
    goes into layers is of another size in each step, and gives its room back.
    """

    def __init__(self, device: torch.device, folder: Path, tier: Callable[[str], Tier]) -> None:
        super().__init__(device)
        self._folder, self._tier_of = folder, tier
        self._places: dict[str, Tensor] = {}  # by name: its bytes, apart from the device

    def zeros(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if name not in self and self._apart(name):
            used = name in self._places  # a new one has zeros in it, and need not be written
            place = self._place(name, shape, dtype)
            self._tensors[name] = place.zero_() if used else place
        return super().zeros(name, shape, dtype)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if self._apart(name):
            place = self._place(name, tensor.shape, tensor.dtype)
            self._write(name, place, tensor)
            tensor = place
        elif any(tensor is own for other, own in self._tensors.items() if self._apart(other)):
            # What is in memory is used: a mapped file would be written out again and again.
            tensor = tensor.to(self._device, copy=True)
        super().__setitem__(name, tensor)

    def drop(self, name: str) -> None:
        super().drop(name)
        if name.startswith("input/"):
            self._give_up(name)

    def values(self) -> Iterable[Tensor]:
        return [tensor for name, tensor in self._tensors.items() if not self._apart(name)]

    def close(self) -> None:
        """Removes the files."""
        self._tensors.clear()
        self._places.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tier(self, name: str) -> Tier:
        return self._tier_of(name.partition("/")[0])

    def _apart(self, name: str) -> bool:
        return self._tier(name) != "memory"

    def _place(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor that is apart under a name; a place that is too small is made anew."""
        size = shape.numel() * dtype.itemsize
        if name not in self._places or self._places[name].nbytes < size:
            self._give_up(name)
            self._places[name] = self._make(name, size)
        return self._places[name][:size].view(dtype).view(shape)

    def _give_up(self, name: str) -> None:
        """No place is kept for a name. Its map goes first: Windows deletes no file that is mapped."""
        if self._places.pop(name, None) is not None and self._tier(name) == "disk":
            (self._folder / name).unlink(missing_ok=True)

    def _write(self, name: str, place: Tensor, tensor: Tensor) -> None:
        if self._tier(name) == "ram":
            place.copy_(tensor)
            return
        # Through the file: page after page of what is mapped would take several times as long.
        with (self._folder / name).open("r+b") as file:
            file.write(tensor_bytes(tensor))

    def _make(self, name: str, size: int) -> Tensor:
        """Bytes apart, all of them 0."""
        if self._tier(name) == "ram":
            return torch.zeros(size, dtype=torch.uint8)
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        need_room(path, size, "optimizer state and what goes into layers")
        with path.open("xb", buffering=0) as file:
            reserve(file.fileno(), size)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
