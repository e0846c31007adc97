"""Input and output of layers as the rest of Talik sees them: (batch, sequence, width), a vector per token.

Most layers return one tensor (batch, sequence, hidden), which is used as it is. Some return several streams,
another order of axes, or a second tensor per token: these are concatenated to one vector.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from talik.base.errors import ChainError


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a layer's result: its place, its axes, and the rest of its shape."""

    place: int
    batch: int
    sequence: int
    rest: tuple[int, ...]
    dtype: torch.dtype

    @property
    def plain(self) -> bool:
        """True if it is (batch, sequence, width) already."""
        return (self.batch, self.sequence, len(self.rest)) == (0, 1, 1)

    @property
    def width(self) -> int:
        """The number of values per token."""
        return math.prod(self.rest)

    def flat(self, tensor: Tensor) -> Float[Tensor, "batch sequence width"]:
        if self.plain:
            return tensor
        return tensor.movedim((self.batch, self.sequence), (0, 1)).reshape(*self._ends(tensor), self.width)

    def own(self, flat: Float[Tensor, "batch sequence width"]) -> Tensor:
        if self.plain:
            return flat.to(self.dtype)
        whole = flat.reshape(*flat.shape[:2], *self.rest).movedim((0, 1), (self.batch, self.sequence))
        return whole.to(
            self.dtype
        ).contiguous()  # the strides that the model's own layers get: strides select kernels

    def _ends(self, tensor: Tensor) -> tuple[int, int]:
        return tensor.shape[self.batch], tensor.shape[self.sequence]


@dataclass(frozen=True, slots=True)
class Form:
    """All tensors that are passed from one layer to the next; the first piece is the hidden states."""

    pieces: tuple[Piece, ...]

    @property
    def width(self) -> int:
        """Numbers per token."""
        return sum(piece.width for piece in self.pieces)

    @property
    def plain(self) -> bool:
        """True if it is one tensor (batch, sequence, width)."""
        return len(self.pieces) == 1 and self.pieces[0].plain

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every piece exactly."""
        dtype = self.pieces[0].dtype
        for piece in self.pieces[1:]:
            dtype = torch.promote_types(dtype, piece.dtype)
        return dtype

    def pack(self, out: Any) -> Float[Tensor, "batch sequence width"]:
        """Concatenates a layer's result to vectors."""
        if len(self.pieces) == 1:
            return self.pieces[0].flat(first_of(out))
        return torch.cat([piece.flat(out[piece.place]).to(self.dtype) for piece in self.pieces], dim=-1)

    def unpack(self, packed: Float[Tensor, "batch sequence width"]) -> dict[int, Tensor]:
        """Splits vectors into tensors, by their place in the result of the previous layer."""
        if len(self.pieces) == 1:
            return {0: self.pieces[0].own(packed)}
        parts = packed.split([piece.width for piece in self.pieces], dim=-1)
        return {piece.place: piece.own(part) for piece, part in zip(self.pieces, parts, strict=True)}


def piece_of(place: int, one: Tensor, other: Tensor, sizes: Sequence[tuple[int, int]]) -> Piece | None:
    """The axes of a tensor, from two batches of different (batch, sequence); None if it is not per token."""
    if one.dim() != other.dim():
        return None
    pairs = list(zip(one.shape, other.shape, strict=True))
    batch, sequence = zip(*sizes, strict=True)
    rest = [a for a, b in pairs if (a, b) not in (batch, sequence)]
    fixed = all(a == b for a, b in pairs if (a, b) not in (batch, sequence))
    if pairs.count(batch) != 1 or pairs.count(sequence) != 1 or not fixed:
        return None
    return Piece(place, pairs.index(batch), pairs.index(sequence), tuple(rest), one.dtype)


def first_of(out: Any) -> Tensor:
    """The hidden states in a layer's result: the result itself, or the first item of a tuple or list."""
    first = out[0] if isinstance(out, (tuple, list)) and out else out
    if not isinstance(first, Tensor):
        raise ChainError(f"a layer returns a {type(out).__name__} in place of hidden states")
    return first


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "keys") and hasattr(value, "values"):
        for item in value.values():
            yield from tensors_in(item)


def take_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separates the hidden states from the other arguments of a layer."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    if "hidden_states" not in rest:
        raise ChainError(f"a layer is called with {', '.join(rest) or 'nothing'}, and not with hidden states")
    return rest.pop("hidden_states"), (), rest


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` with another forward; all other attributes are those of the module."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets `model` to eval mode inside the context, and restores every module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
