"""Runs a model without its weights: stand-ins replace the parameters, and selected columns replace products.

A stand-in takes no memory. A product with a stand-in gives columns of the other factor. Shapes, dtypes and
the dependencies between tokens are those of the model. Attention, masks and rotary tables run for real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from talik.base.errors import ChainError
from talik.model.chain.forms import tensors_in

SMALL = 2**20  # elements up to which a stand-in is allocated

PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}


class StandInProducts(TorchFunctionMode):
    """Computes products and embeddings with stand-ins; every other function runs as it is.

    Args:
        addresses: The storages of the stand-ins, from `without_weights`.
        sequence: The number of tokens in each row.

    Raises:
        ChainError: A function changes a stand-in in place.
    """

    def __init__(self, addresses: frozenset[int], sequence: int) -> None:
        super().__init__()
        self.addresses = addresses
        self.sequence = sequence

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, taken = name_of(func), list(tensors_in((args, kwargs)))
        if taken and writes_in_place(name) and self._is_weight(taken[0]):
            raise ChainError("its forward changes its own weights")
        if name == "embedding" and self._is_weight(taken[-1]):
            return _looked_up(taken[0], taken[-1])
        product = name in PRODUCTS or "grouped_mm" in name
        if not product or not any(map(self._is_weight, taken)):
            return func(*args, **kwargs)
        inputs = [tensor for tensor in taken if not self._is_weight(tensor)]
        x, shape = inputs[0] if inputs else taken[0], _shape_only(func, name, args, kwargs)
        if "matmul" in name and x is not taken[0] and x.dim() > 1:  # W x, and not x W
            return _columns(x.mT, shape.mT, self.sequence).mT
        return _columns(x, shape, self.sequence)

    def _is_weight(self, tensor: Tensor) -> bool:
        return _address(tensor) in self.addresses


@contextlib.contextmanager
def without_weights(model: nn.Module, device: torch.device) -> Iterator[frozenset[int]]:
    """Replaces the parameters, and the buffers that are not loaded, by stand-ins inside the context.

    Yields the addresses of the stand-ins' storages.
    """
    made: dict[int, Tensor] = {}
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and (table is module._parameters or tensor.is_meta):
                    swapped.append((table, name, tensor))
                    made.setdefault(id(tensor), _stand_in(tensor, device))
    try:
        for table, name, tensor in swapped:
            table[name] = made[id(tensor)]
        yield frozenset(_address(tensor) for tensor in made.values())
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


def _stand_in(tensor: Tensor, device: torch.device) -> Tensor:
    """Ones for small parameters (norms, biases, rates); one expanded number for large ones."""
    one = torch.ones((), dtype=tensor.dtype, device=device)
    return nn.Parameter(
        one.repeat(tensor.shape) if tensor.numel() <= SMALL else one.expand(tensor.shape), False
    )


def _shape_only(func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The result of a product on the meta device."""
    if name == "linear" and len(args) > 1:  # most products; slow on the meta device
        return torch.empty(*args[0].shape[:-1], args[1].shape[0], dtype=args[0].dtype, device="meta")
    if "grouped_mm" in name:  # takes only bfloat16 there
        return torch.empty(*args[0].shape[:-1], args[1].shape[-1], dtype=args[0].dtype, device="meta")
    on_meta = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    return func(*on_meta[0], **on_meta[1])


def _columns(x: Tensor, shape: Tensor, sequence: int) -> Tensor:
    """In place of a product: columns of its input, so that a token depends on itself only."""
    pairs = enumerate(zip(x.shape[:-1], shape.shape[:-1], strict=False))
    own = next((i for i, (a, b) in pairs if a != b), min(x.dim(), shape.dim()) - 1)
    mixes = own < x.dim() - 1 and sequence in x.shape[own:]
    if not own or mixes or not x.is_floating_point():
        return torch.ones(shape.shape, dtype=shape.dtype, device=x.device)
    columns = x.flatten(own)
    chosen = (torch.arange(shape.shape[own:].numel(), device=x.device) * 7 + 3) % columns.shape[-1]
    return columns[..., chosen].to(shape.dtype).reshape(shape.shape)


def _looked_up(ids: Tensor, weight: Tensor) -> Tensor:
    """Vectors of length one, different for every token."""
    steps = torch.arange(1, weight.shape[-1] + 1, device=ids.device)
    return torch.sin(ids[..., None].float() * 0.7 + steps * 1.3).to(weight.dtype)


def name_of(func: Callable[..., Any]) -> str:
    """The name of a torch function; empty if it has none."""
    return getattr(func, "__name__", "")


def writes_in_place(name: str) -> bool:
    """True if a torch function of this name changes its first argument.

    PyTorch ends the name of every such function with one underscore; Python's operators are `__setitem__` and
    those like `__iadd__`. The name is known before the call, so that a write to a stand-in can be refused; a
    version counter changes only after it, and inference tensors have none.
    """
    if name.startswith("__"):
        return name == "__setitem__" or (
            name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
        )
    return name.endswith("_")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
