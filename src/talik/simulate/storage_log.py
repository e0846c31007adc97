"""Records when the memory of every tensor is allocated and freed while code runs.

A StorageLog sees every PyTorch operator. A storage is born when it first appears in a result, and dies with
the last tensor that views it. Its cause is assigned later, when its use is known.
"""

from __future__ import annotations

import weakref
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from talik.kernels import bf16_matmul, cross_entropy
from talik.model.chain.chain import Chain
from talik.simulate.flops import flops_of

CAUSES = (
    "program",
    "weights frozen",
    "weights trained",
    "gradients",
    "optimizer state",
    "cache and batches",
    "libraries",
    "allocator",
    "saved activations",
    "recomputed",
    "logits and loss",
    "workspace",
)
OFF_DEVICE = "off device"  # the cause of tensors in mapped files or host RAM, which take no device memory


@runtime_checkable
class Log(Protocol):
    """The interface by which running code reports its phases and the causes of its tensors.

    `device` is the kind of device whose memory is recorded.
    """

    device: str

    def phase(self, name: str, /) -> None: ...
    def unnamed(self) -> int: ...
    def mark(self, tensors: Iterable[Tensor], cause: str) -> None: ...


@dataclass(slots=True)
class Storage:
    """One storage: size, and the event, block and operator of its allocation; `cause` once it is known."""

    bytes: int
    phase: str
    block: str
    operator: str
    shape: tuple[int, ...]
    cause: str | None = None
    dead: bool = False


class StorageLog(TorchDispatchMode):
    """Inside the context, records allocation and release of storages by operators of this thread.

    Attributes:
        births: All storages.
        events: In order, the number of each storage that is born, and its complement (~) when it dies.
        marks: The start of each phase: (number of the event, phase).
        flops: Floating-point operations by phase.
        moved: Bytes read and written by operators without products, by phase.
        device: The kind of device whose memory is recorded.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self._alike: dict[Any, Any] = {}
        self.births: list[Storage] = []
        self.events = array("q")
        self.marks: list[tuple[int, str]] = [(0, "load")]
        self.phase_now, self.block = "load", ""
        self.flops: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self._began = 0
        self._live: dict[int, int] = {}  # number of a storage by its address

    def phase(self, name: str) -> None:
        """Starts a phase. Tensors that a forward leaves allocated at its end are saved activations."""
        if self.phase_now == "forward":
            self._settle("forward", "saved activations")
        self.phase_now, self.block = name, ""
        self.marks.append((len(self.events), name))

    def key(self, number: int) -> int:
        """The number of the storage that is allocated or freed by an event."""
        event = self.events[number]
        return event if event >= 0 else ~event

    def storage(self, number: int) -> Storage:
        """The storage that is allocated or freed by an event."""
        return self.births[self.key(number)]

    def changes(self) -> Iterator[tuple[str, int]]:
        """Yields for every event its cause, and the bytes by which it changes the allocated memory."""
        for number, event in enumerate(self.events):
            made = self.storage(number)
            yield made.cause or "workspace", made.bytes if event >= 0 else -made.bytes

    def alive(self, number: int) -> list[Storage]:
        """The storages that are allocated after an event."""
        events = self.events[: number + 1]
        dead = {~event for event in events if event < 0}
        return [self.births[event] for event in events if event >= 0 and event not in dead]

    def unnamed(self) -> int:
        """Allocated bytes without a cause."""
        return sum(
            self.births[number].bytes for number in self._live.values() if not self.births[number].cause
        )

    def mark(self, tensors: Iterable[Tensor], cause: str) -> None:
        """Assigns a cause to the storages of these tensors; unknown storages are born now."""
        for tensor in tensors:
            made = self.births[self._see(tensor, "before")]
            made.cause = cause
            if cause == OFF_DEVICE:
                made.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls
            return self.run(func, args, kwargs)
        workspace = self.workspace(func, args)  # keeps it alive until this returns
        for tensor in workspace:
            self._see(tensor, func._schema.name)
        out = self.run(func, args, kwargs)
        made = [
            t
            for t in tree_leaves(out)
            if isinstance(t, Tensor) and (isinstance(t, FakeTensor) or not t.is_meta)
        ]
        for tensor in made:
            self._see(tensor, func._schema.name)
        self._count(func, args, kwargs, out, made)
        return out

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one operator."""
        return func(*args, **kwargs)

    def workspace(self, func: Any, args: tuple[Any, ...]) -> list[Tensor]:
        """Tensors as large as the workspace of one of Talik's own operators.

        A dispatch mode does not see inside these. The workspace of PyTorch's kernels is not counted.
        """
        if func.namespace != "talik":
            return []
        return [*cross_entropy.workspace(func, args, self.device), *bf16_matmul.workspace(func, args)]

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, made: list[Tensor]) -> None:
        """Adds the cost of the operator to its phase: FLOPs of a product, else bytes."""
        if (flops := flops_of(func, args, kwargs, out)) is not None:
            self.flops[self.phase_now] += flops
        elif not func.is_view:
            taken = (tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor))
            self.moved[self.phase_now] += sum(t.nbytes for t in (*taken, *made))

    def _see(self, tensor: Tensor, operator: str) -> int:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, 0 if storage.filename else storage.nbytes()
        number = self._live.get(key)
        if number is not None and (
            self.births[number].bytes == size or self.births[number].cause == OFF_DEVICE
        ):
            return number
        if number is not None:  # resized: the old storage has been freed
            self._die(key, number)
        number = self._live[key] = len(self.births)
        cause = "logits and loss" if self.phase_now == "loss" else None
        # Equal values share one object: Python does not return the memory of a large log.
        size, shape = (self._alike.setdefault(value, value) for value in (size, tuple(tensor.shape)))
        made = Storage(size, self.phase_now, self.block, operator, shape, cause)
        self.births.append(made)
        self.events.append(number)
        weakref.finalize(storage, self._die, key, number).atexit = False
        return number

    def _die(self, key: int, number: int) -> None:
        if self.births[number].dead:
            return
        self.births[number].dead = True
        self.events.append(~number)
        if self._live.get(key) == number:
            del self._live[key]

    def _settle(self, phase: str, cause: str, since: int = 0) -> None:
        """Assigns a cause to allocated storages of a phase that have none."""
        for number in self._live.values():
            made = self.births[number]
            if number >= since and made.cause is None and made.phase == phase:
                made.cause = cause

    @contextmanager
    def blocks_of(self, chain: Chain) -> Generator[None]:
        """Inside the context, records which block of the chain is running."""
        with ExitStack() as stack:
            for index, layer in enumerate(chain.layers):
                name = f"layer {index}"
                stack.callback(layer.register_forward_pre_hook(partial(self._enters, name)).remove)
                stack.callback(layer.register_forward_hook(partial(self._leaves, name)).remove)
            named = partial(self._enters, "embeddings")
            stack.callback(chain.embedding.register_forward_pre_hook(named).remove)
            head = chain.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
            if head is not None:
                stack.callback(head.register_forward_pre_hook(partial(self._enters, "tail")).remove)
            yield

    def _enters(self, name: str, module: nn.Module, args: Any) -> None:
        if self.phase_now == "trunk":  # only the output of a layer is still allocated
            self._settle("trunk", "cache and batches")
        self.block, self._began = name, len(self.births)

    def _leaves(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        if self.phase_now == "backward":
            self._settle("backward", "recomputed", since=self._began)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(partial(self._backward_of, name))

    def _backward_of(self, name: str, gradient: Tensor) -> None:
        self.block = name
