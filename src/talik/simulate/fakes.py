"""Replacements for weights, caches and threads in a simulated run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from talik.model.weights.safetensors_file import Entry
from talik.model.weights.weights import Weights
from talik.recipe.plan import Tier
from talik.simulate.pending import Pending
from talik.simulate.storage_log import OFF_DEVICE, Log, StorageLog
from talik.training.memory.keys import GRADIENT, INPUT, PENDING, Key, layer_of_input
from talik.training.memory.scratch import TieredScratch
from talik.training.step.top import Top
from talik.training.trunk.cache import BatchGroup

CAUSE_OF = {GRADIENT: "gradients", PENDING: "gradients", INPUT: "saved activations"}


class FakeWeights(Weights):
    """Weights of which only the tensor tables are known: memory is allocated, but nothing is read."""

    log: StorageLog

    def _read_bytes(self, source: str, into: Tensor, first: int | None = None) -> None:
        pass

    def _check_unchanged(self) -> None:
        pass

    def read(self, names: Iterable[str], buffer: Tensor) -> dict[str, Tensor]:
        names = list(names)
        trained = any(self.hollow(name).requires_grad for name in names)
        self.log.mark([buffer], "weights trained" if trained else "weights frozen")
        return super().read(names, buffer)


def assumed_table(model: nn.Module, folder: Path) -> dict[Path, dict[str, Entry]]:
    """The tensor table of a checkpoint with the model's own tensors, for a folder without weights."""
    file = folder / "model.safetensors"
    entries: dict[str, Entry] = {}
    seen: set[int] = set()
    start = 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            entries[name] = Entry(file, tensor.dtype, tuple(tensor.shape), start, tensor.nbytes)
            start += tensor.nbytes
    return {file: entries}


class ImmediateExecutor(Executor):
    """An executor that runs jobs immediately in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class FakeStates:
    """Hidden states that were never written."""

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self._lengths, self._width, self._dtype = lengths, width, dtype

    def read(self, indices: Sequence[int]) -> Tensor:
        """Like `HiddenStates.read`."""
        longest = max(self._lengths[index] for index in indices)
        return torch.empty(len(indices), longest, self._width, dtype=self._dtype)


class FakeCache:
    """A cache that stores nothing.

    Only some of the groups that a run holds at once are simulated. The hidden states of the others are
    counted as `others` times those of the simulated ones, up to `most` bytes in all.
    """

    def __init__(self, log: Log, others: float = 0.0, most: int = 0) -> None:
        self._log, self._others, self._most = log, others, most

    @contextmanager
    def new_shard(self, groups: Sequence[BatchGroup]) -> Generator[FakeShard]:
        """Like `StatesCache.new_shard`."""
        held: list[Tensor] = []
        if self._others:
            flows = self._log.unnamed()
            size = int(min(self._others * flows, max(0, self._most - flows)))
            held.append(torch.empty(size, dtype=torch.uint8))
            self._log.mark(held, "cache and batches")
        yield FakeShard()
        del held


class FakeShard:
    """A shard that is not written to."""

    def write(self, group: BatchGroup, hidden: Tensor) -> None:
        """Like `Shard.write`, which needs contiguous bytes."""
        hidden.detach().contiguous().view(-1)


class FakeCopy:
    """A working copy without files. Trained tensors are read from it, not from the source."""

    def __init__(self, top: Top) -> None:
        self._names = {name for name, _ in top.parameters()}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def covers(self, name: str) -> bool:
        """Like `WritableOverlay.covers`."""
        return name in self._names

    def read(self, name: str, into: Tensor) -> None:
        """Like `WritableOverlay.read`."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Like `WritableOverlay.write`."""


class MarkedScratch(TieredScratch):
    """A scratch that records the cause of its tensors by their names. Tensors in files take no memory.

    All fake tensors live on the CPU (fake CUDA has no backward). Host-RAM tensors are put on `meta` instead,
    so that code without a copy to the device fails here, as it would on a GPU.

    Attributes:
        pending: The pending micro-batches, whose layer inputs exist as long as those in this scratch.
    """

    def __init__(self, log: Log, tier: Callable[[str], Tier]) -> None:
        super().__init__(torch.device("cpu"), Path(), tier)
        self._host = torch.device("cpu" if log.device == "cpu" else "meta")
        self._log = log
        self.pending: Pending | None = None

    def drop(self, key: Key) -> None:
        """Like `Scratch.drop`."""
        super().drop(key)
        if self.pending and (layer := layer_of_input(key)) is not None:
            self.pending.free_inputs_above(layer)

    def zeros(self, key: Key, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Like `Scratch.zeros`."""
        tensor = super().zeros(key, shape, dtype)
        self._log.mark([tensor], self._cause(key))
        return tensor

    def __setitem__(self, key: Key, tensor: Tensor) -> None:
        if self.pending and (layer := layer_of_input(key)) is not None:
            self.pending.allocate_inputs(layer)
        super().__setitem__(key, tensor)
        self._log.mark([self[key]], self._cause(key))

    def _write(self, key: Key, view: Tensor, tensor: Tensor) -> None:
        pass

    def _make(self, key: Key, size: int) -> Tensor:
        tensor = torch.empty(size, dtype=torch.uint8, device=self._host)
        self._log.mark([tensor], self._cause(key))
        return tensor

    def _cause(self, key: Key) -> str:
        elsewhere = self._tier(key) == "disk" or (self._offloaded(key) and self._log.device != "cpu")
        return OFF_DEVICE if elsewhere else CAUSE_OF.get(key.kind, "optimizer state")
