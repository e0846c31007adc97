"""Records operators without memory: floating-point tensors are fake, integers and booleans are real.

Tokens, positions, masks and the choices of a router are real, so that model code branches as in a real run.
Transformers takes other branches if everything is fake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from talik.simulate.storage_log import StorageLog

Routing = Literal["even", "same"]
SMALL = 4096  # elements up to which a float computed only from integers stays real
IN_PLACE = {"add_", "addcdiv_", "addcmul_", "copy_", "div_", "fill_", "lerp_", "mul_", "sub_", "zero_"}
FACTORIES = {"arange", "zeros", "ones", "full", "tensor", "empty", "scalar_tensor"}


class FakeLog(StorageLog):
    """A StorageLog under a FakeTensorMode in which integers are real.

    Args:
        device: The kind of device whose memory is recorded.
        routing: What routers choose: every expert equally often, or always the same ones.

    Attributes:
        routed: Whether a router has chosen something.
    """

    def __init__(self, device: str = "cpu", routing: Routing = "even") -> None:
        super().__init__(device)
        self.routed, self._routing = False, routing
        self._generator = torch.Generator().manual_seed(0)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operator really if all its tensors are real, otherwise by its handler."""
        name = _name(func)
        if _is_real(name, args, kwargs):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            return tree_map_only(Tensor, _large_floats_fake, out)
        handler = HANDLERS.get(name, _view if func.is_view else FakeLog.run_fake)
        return handler(self, func, args, kwargs)

    def run_fake(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operator on fake tensors by FakeTensorMode; integer results are made real."""
        out = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: self._plausible(tensor, _name(func), args), out)

    def workspace(self, func: Any, args: tuple[Any, ...]) -> list[Tensor]:
        """Operands converted to a common dtype, which a CPU does first (compute_types of TensorIterator)."""
        if func.namespace == "talik":
            with unset_fake_temporarily():  # reads integers
                return super().workspace(func, args)
        if self.device != "cpu" or torch.Tag.pointwise not in func.tags:
            return []
        floats = [t for t in args if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
        if len({tensor.dtype for tensor in floats}) < 2:
            return []
        common = reduce(torch.promote_types, (tensor.dtype for tensor in floats))
        return [torch.empty(t.shape, dtype=common) for t in floats if t.dtype != common]

    def _plausible(self, tensor: Tensor, name: str, args: tuple[Any, ...]) -> Tensor:
        """Real integers in place of those computed from floats: random choices for a router, zeros otherwise.

        The bits of a float, bytes, random bits, and values computed from them stay fake.
        """
        if not isinstance(tensor, FakeTensor) or not _is_integer(tensor.dtype):
            return tensor
        if name in ("view", "randint") or any(
            isinstance(t, FakeTensor) and not t.is_floating_point() for t in args
        ):
            return tensor
        with unset_fake_temporarily():
            shape = [int(size) for size in tensor.shape]
            if name == "topk":
                return self._choice(shape, args[0].shape[args[2] if len(args) > 2 else -1])
            if name in ("sort", "argsort"):
                return torch.arange(shape[-1]).expand(shape).contiguous()
            return torch.zeros(shape, dtype=tensor.dtype)

    def _choice(self, shape: list[int], count: int) -> Tensor:
        """For each row a different choice among `count`, or the same for all rows."""
        self.routed = True
        if self._routing == "same":
            return torch.arange(shape[-1]).expand(shape).contiguous()
        rows = torch.rand(math.prod(shape[:-1]), count, generator=self._generator)
        return rows.argsort(-1)[:, : shape[-1]].reshape(shape).contiguous()


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Boolean indices converted to the positions where they are true."""
    found: list[Tensor | None] = []
    with unset_fake_temporarily():
        for index in indices:
            masks = index is not None and index.dtype in (torch.bool, torch.uint8)
            found += index.nonzero(as_tuple=True) if masks and index is not None else [index]
    return found


def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _is_real(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if an operator has only real tensors, or creates integers from none."""
    if args and isinstance(args[0], FakeTensor):  # nearly all calls
        return False
    taken = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if taken:
        return not any(isinstance(tensor, FakeTensor) for tensor in taken)
    return name in FACTORIES and _makes_integers(name, args, kwargs)


def _makes_integers(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is None:
        return name == "arange" and all(isinstance(value, int) for value in args)
    return _is_integer(dtype)


def _is_integer(dtype: torch.dtype) -> bool:
    """True if numbers of this dtype are real. Bytes hold weights and are fake."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.uint8)


def _view(log: FakeLog, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view of a fake tensor by its meta kernel; FakeTensorMode takes three times as long."""
    viewed: FakeTensor = args[0]
    with in_kernel_invocation_manager(viewed.fake_mode):
        out = func(*args, **kwargs)
    return tree_map_only(
        Tensor,
        lambda t: t if isinstance(t, FakeTensor) else FakeTensor(viewed.fake_mode, t, viewed.fake_device),
        out,
    )


def _device(log: FakeLog, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    return args[0].fake_device


def _in_place(log: FakeLog, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The changed tensor, without the shape checks of FakeTensorMode, which take longer."""
    return args[0] if isinstance(args[0], FakeTensor) else log.run_fake(func, args, kwargs)


def _index(log: FakeLog, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The number of rows that a mask selects is known, because masks are real."""
    return log.run_fake(func, (args[0], _places(args[1])), kwargs)


def _scalar(log: FakeLog, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The value of a fake float; integers are real."""
    return 1.0


def _grouped_product(log: FakeLog, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An empty result of the shape in _meta_grouped_mm of PyTorch, which itself takes only bf16.

    The CPU kernel also takes fp32.
    """
    one, other = args[:2]
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    shape = [one.shape[-2], other.shape[-1]]
    if one.dim() == other.dim():
        groups = one.shape[0] if one.dim() == 3 or offsets is None else offsets.shape[0]
        shape = [groups, *shape]
    return torch.empty(shape, dtype=one.dtype)


# Operators on fake tensors that FakeTensorMode does not run.
HANDLERS: dict[str, Callable[[FakeLog, Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    "prim::device": _device,
    "index": _index,
    "_local_scalar_dense": _scalar,
    "_grouped_mm": _grouped_product,
    **dict.fromkeys(IN_PLACE, _in_place),
}


def _large_floats_fake(tensor: Tensor) -> Tensor:
    if not tensor.dtype.is_floating_point or tensor.numel() <= SMALL:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@contextmanager
def fake_world(model: nn.Module, device: str = "cpu", routing: Routing = "even") -> Generator[FakeLog]:
    """Makes tensors fake and records them inside the context; the model's real float buffers are replaced."""
    with FakeTensorMode(allow_non_fake_inputs=True), FakeLog(device, routing) as log, _fake_buffers(model):
        yield log


@contextmanager
def _fake_buffers(model: nn.Module) -> Generator[None]:
    """Buffers, and tensors that modules hold as plain attributes."""
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
