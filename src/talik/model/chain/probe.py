"""Finds out how a model calls its layers, by watching its own forward on a few tokens. No weights are needed.

Every parameter is replaced by a stand-in that takes no memory, and a product with it by a selection of the
input's columns. Shapes, dtypes and the dependencies between tokens are those of the model, and only these are
used. Attention, masks and rotary tables run for real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from talik.base.errors import ChainError
from talik.model.chain.forms import evaluating, first_of, replaced, take_hidden
from talik.model.chain.positions import find_alone

SMALL = 2**20  # elements up to which a stand-in is allocated

# Functions that use only shape and dtype of a tensor, and functions that read its values.
SHAPE_ONLY = {
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "size", "dim"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
}
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose", "is_nonzero"}
PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}


@dataclass
class Seen:
    """The record of one watched forward.

    Attributes:
        handed: The input of layer 0, and the whole result of every layer.
        slots: For every layer, the places of the previous result that are among its arguments.
        used: The slots that the layer computes with.
        links: Pairs (source, user) of layers: the second computes with a tensor of the first that is not in
            its result.
        problem: The first thing that a chain cannot do.
        alone: Modules of the last layer that work on each token separately (`positions`).
    """

    order: list[int] = field(default_factory=list)
    handed: list[Any] = field(default_factory=list)
    slots: dict[int, set[int]] = field(default_factory=dict)
    used: set[tuple[int, int]] = field(default_factory=set)
    links: set[tuple[int, int]] = field(default_factory=set)
    problem: str | None = None
    calls_need_embeddings: bool = False
    embedding_size: int = 0
    alone: tuple[str, ...] = ()


class _Watch(TorchFunctionMode):
    """Watches every call of torch functions, and so which tensor is computed from which."""

    def __init__(self, layers: int, sequence: int, tries: bool) -> None:
        super().__init__()
        self.tries = tries  # whether modules of the last layer are also run separately
        self.sequence = sequence
        self.seen = Seen()
        self.layers = layers
        self.running: int | None = None  # the running layer; None outside the layers
        self.again = False  # whether the layer runs again and is not recorded
        self.born: dict[int, int] = {}  # by id of a tensor: the layer that created it
        self.embedded: set[int] = set()  # ids of tensors with embedded tokens outside the layers
        self.extras: dict[int, int] = {}  # by id: its place in the result of the previous layer
        self.weights: set[int] = set()  # addresses of the stand-ins
        self.alive: list[Any] = []  # keeps tensors alive, so that ids are unique

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        taken = list(tensors_in((args, kwargs)))
        writes = _writes(name)
        if writes and taken and _address(taken[0]) in self.weights:
            raise ChainError("its forward changes its own weights")
        out = self._product(func, name, args, kwargs, taken)
        if self.again:
            return out
        made = [t for t in tensors_in(out) if writes or not any(_same(t, before) for before in taken)]
        if name in READS or (made and name not in SHAPE_ONLY):
            self._note(name, taken)
            self._mark(taken, made)
        return out

    def _note(self, name: str, taken: list[Tensor]) -> None:
        """Records which layer computes with which tensors."""
        if self.running is None:
            if name in READS and any(id(t) in self.embedded for t in taken):
                self.seen.calls_need_embeddings = True
            self._check_between(taken)
            return
        for tensor in taken:
            giver = self.born.get(id(tensor), self.running)
            if id(tensor) in self.extras:
                self.seen.used.add((self.running, self.extras[id(tensor)]))
            elif giver != self.running and not _same(tensor, first_of(self.seen.handed[self.running])):
                self.seen.links.add((giver, self.running))

    def _check_between(self, taken: list[Tensor]) -> None:
        done = len(self.seen.order)
        if not done:
            return
        last = first_of(self.seen.handed[-1])
        made_in_layers = [t for t in taken if id(t) in self.born or id(t) in self.extras]
        if done < self.layers and made_in_layers:
            self._problem("it computes with hidden states between its layers")
        elif any(not _same(tensor, last) for tensor in made_in_layers):
            self._problem("its tail needs more than the result of the last layer")
        elif done == self.layers and any(id(tensor) in self.embedded for tensor in taken):
            self._problem("its tail needs the embedded tokens")

    def _problem(self, problem: str) -> None:
        self.seen.problem = self.seen.problem or problem

    def _mark(self, taken: list[Tensor], made: list[Tensor]) -> None:
        self.alive += made
        if self.running is not None:
            for tensor in made:
                self.born.setdefault(id(tensor), self.running)
        elif any(id(tensor) in self.embedded for tensor in taken):
            self.embedded |= {id(tensor) for tensor in made}

    def _product(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any], taken: list[Tensor]
    ) -> Any:
        if name == "embedding" and _address(taken[-1]) in self.weights:
            return _looked_up(taken[0], taken[-1])
        product = name in PRODUCTS or "grouped_mm" in name
        inputs = [tensor for tensor in taken if _address(tensor) not in self.weights] if product else taken
        if len(inputs) == len(taken):
            return func(*args, **kwargs)
        x, shape = inputs[0] if inputs else taken[0], _shape_only(func, name, args, kwargs)
        if "matmul" in name and x is not taken[0] and x.dim() > 1:  # W x, and not x W
            return _columns(x.mT, shape.mT, self.sequence).mT
        return _columns(x, shape, self.sequence)

    def run_layer(
        self, index: int, layer: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.running is not None:
            raise ChainError(f"layer {self.running} calls layer {index}")
        self.enter(index, *take_hidden(args, kwargs))
        out = own(*args, **kwargs)
        if self.tries and index == self.layers - 1:
            self.again = True
            self.seen.alone = find_alone(layer, lambda: first_of(own(*args, **kwargs)))
            self.again = False
        self.leave(out)
        return out

    def run_embedding(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        self.embedded.add(id(out))
        self.alive.append(out)
        self.seen.embedding_size = out.shape[-1]
        return out

    def enter(self, index: int, hidden: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if index == 0 and not self.seen.order:
            self.seen.handed.append(hidden)
        elif self.seen.order == list(range(index)) and not _same(hidden, first_of(self.seen.handed[-1])):
            self._problem("it computes with hidden states between its layers")
        self.seen.order.append(index)
        before = self.seen.handed[-1]
        given = list(before[1:]) if isinstance(before, (tuple, list)) else []
        self.extras = {id(t): place for place, t in enumerate(given, start=1) if isinstance(t, Tensor)}
        leaves = list(tensors_in((rest, kwargs)))
        self.seen.slots[index] = {self.extras[id(t)] for t in leaves if id(t) in self.extras}
        if any(id(tensor) in self.embedded for tensor in leaves):
            self.seen.calls_need_embeddings = True
        self.running = index

    def leave(self, out: Any) -> None:
        first_of(out)
        index = self.running or 0
        for tensor in tensors_in(out):
            self.alive.append(tensor)
            self.born.setdefault(id(tensor), index)
        self.seen.handed.append(out)
        self.running = None


def watch(
    model: nn.Module, layers: list[nn.Module], embedding: nn.Module, ids: Tensor, *, alone: bool = False
) -> Seen:
    """Runs the model's own forward once, without its weights.

    `alone`: run the last layer again for each of its modules, to find those that work on each token
    separately.

    Raises:
        ChainError: The model cannot be run as a chain.
    """
    mode = _Watch(len(layers), ids.shape[1], alone)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        for index, layer in enumerate(layers):
            stack.enter_context(replaced(layer, partial(mode.run_layer, index, layer, layer.forward)))
        stack.enter_context(replaced(embedding, partial(mode.run_embedding, embedding.forward)))
        weights = stack.enter_context(_weightless(model, ids.device))
        mode.weights = {_address(weight) for weight in weights}
        stack.enter_context(mode)
        model(input_ids=ids, attention_mask=None, use_cache=False)
    return mode.seen


@contextlib.contextmanager
def _weightless(model: nn.Module, device: torch.device) -> Iterator[list[Tensor]]:
    """The model with stand-ins for its parameters and for buffers that are not loaded; and the stand-ins."""
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
        yield list(made.values())
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


def _writes(name: str) -> bool:
    """True if a function of this name changes its first argument."""
    if name.startswith("__"):
        return name == "__setitem__" or (
            name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
        )
    return name.endswith("_")


def _same(one: Tensor, other: Tensor) -> bool:
    """True if both are one tensor, or one is a view of all of the other (`hidden[:, :]`)."""
    if one is other:
        return True
    alike = (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    return alike and not one.is_meta and one.numel() > 0 and one.data_ptr() == other.data_ptr()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


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
