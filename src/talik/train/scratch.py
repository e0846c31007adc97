"""Named tensors that outlive one operation: gradients, masters, optimizer state, what goes into a layer.

In the memory of one device, or some kinds of them in files that are mapped: the system writes those out and
reads them back as it needs the memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from talik.files import need_room
from talik.model.checkpoint import tensor_bytes
from talik.system import reserve


@runtime_checkable
class Scratch(Protocol):
    """Named tensors. `zeros` makes one if it is not there yet; `drop` forgets one.

    Of a name the part before the first / is its kind. `values` are the tensors that are in memory.
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


class FileScratch(MemoryScratch):
    """Tensors in memory, but those of some kinds in a folder of files, changed in place there.

    `on_disk` says of a kind whether it is such a one. A file's room is taken when it is made (NoRoomError,
    OSError); a dropped tensor's file waits for the next of its name. On the CPU alone: only there a tensor
    can be a file.
    """

    def __init__(self, device: torch.device, folder: Path, on_disk: Callable[[str], bool]) -> None:
        super().__init__(device)
        self._folder, self._on_disk = folder, on_disk
        self._mapped: dict[str, Tensor] = {}  # by name: the bytes of its file

    def zeros(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if name not in self and self._in_file(name):
            used = name in self._mapped  # a new file has zeros in it, and need not be written
            place = self._place(name, shape, dtype)
            self._tensors[name] = place.zero_() if used else place
        return super().zeros(name, shape, dtype)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if self._in_file(name):
            place = self._place(name, tensor.shape, tensor.dtype)
            self._write(self._folder / name, tensor)
            tensor = place
        elif any(tensor is own for other, own in self._tensors.items() if self._in_file(other)):
            tensor = tensor.clone()  # what is in memory is used, and would be written out again and again
        super().__setitem__(name, tensor)

    def values(self) -> Iterable[Tensor]:
        return [tensor for name, tensor in self._tensors.items() if not self._in_file(name)]

    def close(self) -> None:
        """Removes the files."""
        self._tensors.clear()
        self._mapped.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _in_file(self, name: str) -> bool:
        return self._on_disk(name.partition("/")[0])

    def _place(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor that a name's file is; a file that is too small is made anew."""
        size = shape.numel() * dtype.itemsize
        if name not in self._mapped or self._mapped[name].nbytes < size:
            self._mapped[name] = self._make(self._folder / name, size)
        return self._mapped[name][:size].view(dtype).view(shape)

    def _write(self, path: Path, tensor: Tensor) -> None:
        """Through the file: page after page of what is mapped would take several times as long."""
        with path.open("r+b") as file:
            file.write(tensor_bytes(tensor))

    def _make(self, path: Path, size: int) -> Tensor:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        need_room(path, size, "optimizer state and what goes into layers")
        with path.open("xb", buffering=0) as file:
            reserve(file.fileno(), size)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
