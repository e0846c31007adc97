"""Records operators without memory: floating-point tensors are fake, integers and booleans are real.

Tokens, positions, masks and the choices of a router are real, so that model code branches as in a real run.
Transformers takes other branches if everything is fake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func.is_view and isinstance(args[0], FakeTensor):
            return _view(func, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fake = any(isinstance(tensor, FakeTensor) for tensor in taken)
        if name in IN_PLACE and isinstance(args[0], FakeTensor):
            return args[0]  # same result as with a fake, but faster
        if fake and name == "index":  # the number of rows that a mask selects is known
            args = (args[0], _places(args[1]))
        if fake and name == "_local_scalar_dense":
            return 1.0  # reading a float; integers are real
        if (taken and not fake) or (not taken and name in FACTORIES and _makes_integers(name, args, kwargs)):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            return tree_map_only(Tensor, _large_floats_fake, out)
        if name == "_grouped_mm":  # the fake takes only bf16; the CPU kernel also takes fp32
            return _grouped_product(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs"))
        out = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: self._plausible(tensor, name, args), out)

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


def _grouped_product(one: Tensor, other: Tensor, offsets: Tensor | None) -> Tensor:
    """The result of a grouped product, by the dimensions of both sides (_meta_grouped_mm of PyTorch)."""
    shape = [one.shape[-2], other.shape[-1]]
    if one.dim() == other.dim():
        groups = one.shape[0] if one.dim() == 3 or offsets is None else offsets.shape[0]
        shape = [groups, *shape]
    return torch.empty(shape, dtype=one.dtype)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Boolean indices converted to the positions where they are true."""
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
    """True if numbers of this dtype are real. Bytes hold weights and are fake."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.uint8)


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view of a fake tensor by its meta kernel; FakeTensorMode takes three times as long."""
    viewed: FakeTensor = args[0]
    with in_kernel_invocation_manager(viewed.fake_mode):
        out = func(*args, **kwargs)
    return tree_map_only(
        Tensor,
        lambda t: t if isinstance(t, FakeTensor) else FakeTensor(viewed.fake_mode, t, viewed.fake_device),
        out,
    )


def _large_floats_fake(tensor: Tensor) -> Tensor:
    if not tensor.dtype.is_floating_point or tensor.numel() <= SMALL:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@contextmanager
def fake_world(model: nn.Module, device: str = "cpu", routing: Routing = "even") -> Iterator[FakeLog]:
    """Makes tensors fake and records them inside the context; the model's real float buffers are replaced."""
    with FakeTensorMode(allow_non_fake_inputs=True), FakeLog(device, routing) as log, _fake_buffers(model):
        yield log


@contextmanager
def _fake_buffers(model: nn.Module) -> Iterator[None]:
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
