"""What stands in for the world while a run is simulated: floats without memory, weights without files.

Integers and booleans (tokens, positions, masks, the experts that a router chose) are real, so whatever a
model's code decides by them is decided as in a run; Transformers takes other branches where everything is
fake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

from talik.model.checkpoint import Entry
from talik.model.weights import Weights
from talik.plan.storage_log import Log, StorageLog
from talik.train.cache import Cache, Group, States
from talik.train.cache_shard import ShardWriter
from talik.train.scratch import MemoryScratch

Routing = Literal["even", "same"]
SMALL = 4096  # elements up to which a float computed from integers alone stays real
IN_PLACE = {"add_", "addcdiv_", "addcmul_", "copy_", "div_", "fill_", "lerp_", "mul_", "sub_", "zero_"}
FACTORIES = {"arange", "zeros", "ones", "full", "tensor", "empty", "scalar_tensor"}


class FakeLog(StorageLog):
    """A StorageLog under a FakeTensorMode, in which integers are real.

    `routing` is what a router chooses: every expert about as often as any other, or always the same ones.
    `routed` tells afterwards whether something was chosen.
    """

    def __init__(self, routing: Routing = "even") -> None:
        super().__init__()
        self.routed = False
        self._routing = routing
        self._generator = torch.Generator().manual_seed(0)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        name = func._schema.name.removeprefix("aten::")
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fake = any(isinstance(tensor, FakeTensor) for tensor in taken)
        if name in IN_PLACE and isinstance(args[0], FakeTensor):
            return args[0]  # as a fake of it would be, without the work
        if fake and name == "index":  # how many rows a mask chooses is known
            args = (args[0], _places(args[1]))
        if fake and name == "_local_scalar_dense":
            return 1.0  # a float that is read; integers are real
        if (taken and not fake) or (not taken and name in FACTORIES and _makes_integers(name, args, kwargs)):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            return tree_map_only(Tensor, _large_floats_fake, out)
        if name == "_grouped_mm":  # its fake takes bf16 alone, where the CPU's kernel takes fp32 too
            return _grouped_product(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs"))
        out = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: self._plausible(tensor, name, args), out)

    def _plausible(self, tensor: Tensor, name: str, args: tuple[Any, ...]) -> Tensor:
        """Integers that were computed from floats: a router's choice is drawn, anything else is zeros."""
        if not isinstance(tensor, FakeTensor) or not _is_integer(tensor.dtype):
            return tensor
        with unset_fake_temporarily():
            shape = [int(size) for size in tensor.shape]
            if name == "topk":
                return self._choice(shape, args[0].shape[args[2] if len(args) > 2 else -1])
            if name in ("sort", "argsort"):
                return torch.arange(shape[-1]).expand(shape).contiguous()
            return torch.zeros(shape, dtype=tensor.dtype)

    def _choice(self, shape: list[int], count: int) -> Tensor:
        """For each row another choice among `count`, or for all the same."""
        self.routed = True
        if self._routing == "same":
            return torch.arange(shape[-1]).expand(shape).contiguous()
        rows = torch.rand(math.prod(shape[:-1]), count, generator=self._generator)
        return rows.argsort(-1)[:, : shape[-1]].reshape(shape).contiguous()


def _grouped_product(one: Tensor, other: Tensor, offsets: Tensor | None) -> Tensor:
    """The result of a grouped product, by both sides' dimensions (torch's _meta_grouped_mm)."""
    shape = [one.shape[-2], other.shape[-1]]
    if one.dim() == other.dim():
        groups = one.shape[0] if one.dim() == 3 or offsets is None else offsets.shape[0]
        shape = [groups, *shape]
    return torch.empty(shape, dtype=one.dtype)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks among the indices as the places where they are true."""
    found: list[Tensor | None] = []
    with unset_fake_temporarily():
        for index in indices:
            masks = index is not None and index.dtype in (torch.bool, torch.uint8)
            found += index.nonzero(as_tuple=True) if masks and index is not None else [index]
    return found


def _makes_integers(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is None:
        return name == "arange" and all(isinstance(value, int) for value in args)
    return _is_integer(dtype)


def _is_integer(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype are real; a buffer of bytes is for weights, and as fake as they are."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.uint8)


def _large_floats_fake(tensor: Tensor) -> Tensor:
    if not tensor.dtype.is_floating_point or tensor.numel() <= SMALL:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@contextmanager
def fake_world(model: nn.Module, routing: Routing = "even") -> Iterator[FakeLog]:
    """Inside, tensors are fake and logged, and the model's real float buffers have fakes in their place."""
    with FakeTensorMode(allow_non_fake_inputs=True), FakeLog(routing) as log, _fake_buffers(model):
        yield log


@contextmanager
def _fake_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers, and tensors that modules keep as plain attributes."""
    made: dict[int, Tensor] = {}
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        for table in (module._buffers, vars(module)):
            for name, tensor in list(table.items()):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                    swapped.append((table, name, tensor))
                    made.setdefault(id(tensor), torch.empty_like(tensor, device="cpu"))
    try:
        for table, name, tensor in swapped:
            table[name] = made[id(tensor)]
        yield
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


class FakeWeights(Weights):
    """The weights of a checkpoint of which only the tables are known: everything but the bytes is read."""

    log: StorageLog

    def _read_bytes(self, source: str, into: Tensor, first: int = 0) -> None:
        pass

    def _check_unchanged(self) -> None:
        pass

    def read(self, names: Iterable[str], buffer: Tensor) -> dict[str, Tensor]:
        names = list(names)
        trained = any(self.hollow(name).requires_grad for name in names)
        self.log.mark([buffer], "weights trained" if trained else "weights frozen")
        return super().read(names, buffer)


def assumed_table(model: nn.Module, folder: Path) -> dict[Path, dict[str, Entry]]:
    """The table of a checkpoint that holds the model's own tensors, for a folder without weights."""
    file = folder / "model.safetensors"
    entries, start, seen = {}, 0, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            entries[name] = Entry(file, tensor.dtype, tuple(tensor.shape), start, tensor.nbytes)
            start += tensor.nbytes
    return {file: entries}


class AtOnce(Executor):
    """Runs what is submitted in the caller's thread: what a reader would have read is there at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class FakeStates(States):
    """Hidden states that were never written."""

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self._lengths, self._width, self._dtype = lengths, width, dtype

    def read(self, indices: Sequence[int]) -> Tensor:
        """As `States.read`."""
        longest = max(self._lengths[index] for index in indices)
        return torch.empty(len(indices), longest, self._width, dtype=self._dtype)


class FakeCache(Cache):
    """A cache that keeps nothing.

    Of the groups that a run holds at once some are simulated; `others` is how many times their bytes the
    others take, as far as `most` bytes in all allow.
    """

    def __init__(self, log: Log, others: float = 0.0, most: int = 0) -> None:
        self._log, self._others, self._most = log, others, most

    @contextmanager
    def new_shard(self, groups: Sequence[Group]) -> Iterator[ShardWriter]:
        """As `Cache.new_shard`."""
        held = []
        if self._others:
            flows = self._log.unnamed()
            size = int(min(self._others * flows, max(0, self._most - flows)))
            held.append(torch.empty(size, dtype=torch.uint8))
            self._log.mark(held, "cache and batches")
        yield FakeShard()
        del held


class FakeShard(ShardWriter):
    """A shard that nothing is written to."""

    def __init__(self) -> None:
        pass

    def write(self, group: Group, hidden: Tensor) -> None:
        """As `ShardWriter.write`, which needs the bytes in a row."""
        hidden.detach().contiguous().view(-1)


class MarkedScratch(MemoryScratch):
    """A scratch whose tensors' causes are known by their names."""

    def __init__(self, device: torch.device, log: Log) -> None:
        super().__init__(device)
        self._log = log

    def zeros(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        tensor = super().zeros(name, shape, dtype)
        self._log.mark([tensor], _cause(name))
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, tensor)
        self._log.mark([tensor], _cause(name))


def _cause(name: str) -> str:
    return "gradients" if name.startswith("gradient/") else "optimizer state"
