"""Finds out how a model calls its layers, by its own forward on a few tokens. No weights are needed.

`watch` runs the forward with stand-ins for the weights (`stand_ins`), and records a flat list of torch
functions and layer calls. `records` has the functions that read this list.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from talik.base.errors import ChainError
from talik.model.chain import records as read
from talik.model.chain.forms import evaluating, first_of, replaced, take_hidden, tensors_in
from talik.model.chain.positions import find_alone
from talik.model.chain.records import READS, Embedded, LayerEnd, LayerStart, Op, Record, is_same
from talik.model.chain.stand_ins import StandInProducts, name_of, without_weights, writes_in_place

# Functions that use only shape and dtype of a tensor.
SHAPE_ONLY = {
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "size", "dim"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the records of one forward show.

    Attributes:
        order: The layers in the order of their calls.
        handed: The input of layer 0, and the whole result of every layer.
        slots: For every layer, the places of the previous result that are among its arguments.
        used: Pairs (layer, slot): the slots that the layer computes with.
        links: Pairs (source, user) of layers: the second computes with a tensor of the first that is not in
            its result.
        problem: The first thing that a chain cannot do.
        calls_need_embeddings: Whether arguments of the layers are computed from embedded tokens.
        embedding_size: The width of the embedded tokens.
        alone: Modules of the last layer that work on each token separately (`positions`).
    """

    order: list[int]
    handed: list[Any]
    slots: dict[int, set[int]]
    used: set[tuple[int, int]]
    links: set[tuple[int, int]]
    problem: str | None
    calls_need_embeddings: bool
    embedding_size: int
    alone: tuple[str, ...] = ()


def watch(
    model: nn.Module, layers: list[nn.Module], embedding: nn.Module, ids: Tensor, *, alone: bool = False
) -> Seen:
    """Runs the model's own forward once, without its weights.

    Args:
        model: A causal LM.
        layers: Its layers.
        embedding: Its table of the input tokens.
        ids: Tokens (batch, sequence).
        alone: Whether to run the last layer again for each of its modules, to find those that work on each
            token separately.

    Raises:
        ChainError: The model cannot be run as a chain.
    """
    separate: tuple[str, ...] = ()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        addresses = stack.enter_context(without_weights(model, ids.device))
        recorder = _Recorder(addresses, ids.shape[1])
        _record(recorder, model, layers, embedding, ids)
        last = recorder.calls.get(len(layers) - 1)
        if alone and last is not None:
            stack.enter_context(StandInProducts(addresses, ids.shape[1]))
            separate = find_alone(layers[-1], lambda: first_of(last()))
    return seen_in(recorder.records, len(layers), separate)


def seen_in(records: Sequence[Record], layers: int, alone: tuple[str, ...] = ()) -> Seen:
    """Everything that the records of one forward of a model with so many layers show."""
    used, links = read.uses_in(records)
    return Seen(
        order=read.order_in(records),
        handed=read.handed_in(records),
        slots=read.slots_in(records),
        used=used,
        links=links,
        problem=next(read.problems_in(records, layers), None),
        calls_need_embeddings=read.calls_need_embeddings(records),
        embedding_size=next((r.vectors.shape[-1] for r in records if isinstance(r, Embedded)), 0),
        alone=alone,
    )


class _Recorder(StandInProducts):
    """Records the torch functions, the calls of the layers and the embedded tokens of one forward."""

    def __init__(self, addresses: frozenset[int], sequence: int) -> None:
        super().__init__(addresses, sequence)
        self.records: list[Record] = []
        self.running: int | None = None  # the running layer; None outside the layers
        self.calls: dict[int, Callable[[], Any]] = {}  # by layer: calls it again

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        name, reads = name_of(func), tuple(tensors_in((args, kwargs)))
        made = tuple(created(name, reads, out))
        if name in READS or (made and name not in SHAPE_ONLY):
            self.records.append(Op(name, self.running, reads, made))
        return out

    def run_layer(self, index: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replaces the forward of layer `index`."""
        if self.running is not None:
            raise ChainError(f"layer {self.running} calls layer {index}")
        hidden, *rest = take_hidden(args, kwargs)
        self.records.append(LayerStart(index, hidden, tuple(tensors_in(rest))))
        self.calls[index] = partial(own, *args, **kwargs)
        self.running = index
        out = own(*args, **kwargs)
        self.running = None
        first_of(out)  # raises if the layer returns no hidden states
        self.records.append(LayerEnd(index, out))
        return out

    def run_embedding(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replaces the forward of the table of the input tokens."""
        out = own(*args, **kwargs)
        self.records.append(Embedded(out))
        return out


def _record(
    recorder: _Recorder, model: nn.Module, layers: list[nn.Module], embedding: nn.Module, ids: Tensor
) -> None:
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(replaced(layer, partial(recorder.run_layer, index, layer.forward)))
        stack.enter_context(replaced(embedding, partial(recorder.run_embedding, embedding.forward)))
        stack.enter_context(recorder)
        model(input_ids=ids, attention_mask=None, use_cache=False)


def created(name: str, reads: Sequence[Tensor], out: Any) -> Iterator[Tensor]:
    """The tensors in a function's result that it creates or changes, and does not only pass on."""
    changes = writes_in_place(name)
    for tensor in tensors_in(out):
        if changes or not any(is_same(tensor, before) for before in reads):
            yield tensor
