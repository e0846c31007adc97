"""Operators without memory: floats are fake, integers and booleans are real.

Tokens, positions, masks, the experts that a router chose are real, so whatever a model's code decides by them
is decided as in a run; Transformers takes other branches where everything is fake.
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
SMALL = 4096  # elements up to which a float computed from integers alone stays real
IN_PLACE = {"add_", "addcdiv_", "addcmul_", "copy_", "div_", "fill_", "lerp_", "mul_", "sub_", "zero_"}
FACTORIES = {"arange", "zeros", "ones", "full", "tensor", "empty", "scalar_tensor"}


class FakeLog(StorageLog):
    """A StorageLog under a FakeTensorMode, in which integers are real.

    `device` is the kind of device whose memory is logged. `routing` is what a router chooses: every expert
    about as often as any other, or always the same ones. `routed` tells afterwards whether something was
    chosen.
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

    def beside(self, func: Any, args: tuple[Any, ...]) -> list[Tensor]:
        """Operands of unlike dtypes, which a CPU first converts to one (TensorIterator's compute_types)."""
        if func.namespace == "talik":
            with unset_fake_temporarily():  # integers are read
                return super().beside(func, args)
        if self.device != "cpu" or torch.Tag.pointwise not in func.tags:
            return []
        floats = [t for t in args if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
        if len({tensor.dtype for tensor in floats}) < 2:
            return []
        common = reduce(torch.promote_types, (tensor.dtype for tensor in floats))
        return [torch.empty(t.shape, dtype=common) for t in floats if t.dtype != common]

    def _plausible(self, tensor: Tensor, name: str, args: tuple[Any, ...]) -> Tensor:
        """Integers that were computed from floats: a router's choice is drawn, anything else is zeros.

        The bits of a float, bytes, random bits, and what is computed from them, stay fake.
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


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view of a fake tensor, by its meta kernel alone: the mode's own way takes three times as long."""
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
    """Inside, tensors are fake and logged, and the model's real float buffers have fakes in their place."""
    with FakeTensorMode(allow_non_fake_inputs=True), FakeLog(device, routing) as log, _fake_buffers(model):
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
