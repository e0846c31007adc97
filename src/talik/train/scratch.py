"""Named tensors that outlive one operation: gradients, optimizer state, masters. Here in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Scratch(Protocol):
    """Named tensors. `zeros` makes one if it is not there yet; `drop` forgets one; `values` are all."""

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
