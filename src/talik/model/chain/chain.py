"""A model as a chain of blocks, each run by the model's own code: embed -> layer 0 .. L-1 -> tail.

The *skeleton forward* is the model's own forward with every layer replaced by a recorder that notes the
arguments of the layer (masks, positions, rotary tables) and returns the hidden states unchanged. Any layer
can then be run by itself, in any order. The *tail* is the model's own forward with the last layer replaced by
a stub that returns given hidden states, so final norms, soft-capping and scaling are the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from talik.model.anatomy import parts_of
from talik.model.chain.facts import Facts, find_facts
from talik.model.chain.forms import replaced, take_hidden
from talik.model.chain.positions import at_rows
from talik.model.chain.rope import forget_lengths, rope_group


@dataclass(frozen=True, slots=True)
class Slot:
    """Marks a place in a layer's arguments that holds another result of the previous layer, by its place
    there.
    """

    place: int


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one layer, without the hidden states.

    `left` is shared by all calls of a skeleton: by layer and place, results that a layer passes to the next
    one and that are not vectors per token (such as the indices of keys that sparse attention has selected).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    left: dict[tuple[int, int], Any]


class _AllRecorded(Exception):
    """Ends a skeleton forward after the last layer."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The embedded tokens of one batch, and the arguments of every layer.

    Layers that share state (`Chain.lowest_cut`) leave it in the calls: run them in order, once, before
    running any again.
    """

    embedded: Float[Tensor, "batch sequence width"]
    calls: tuple[Call, ...]


class Chain:
    """The blocks of a causal language model of Transformers. The model is not changed.

    The layers' weights are not needed: they may be on the meta device and be loaded later.

    Args:
        model: The model.
        device: Where the tokens are and the layers run; by default that of the first loaded parameter.

    Attributes:
        calls_need_embeddings: The arguments of layers contain values of the embedded tokens (Gemma 3n's
            inputs per layer), so embeddings are looked up even for a skeleton without them.

    Raises:
        ChainError: The layers are not called once each, in order, each with the result of the previous one,
            or the model is not causal.
        UsageError: The config asks for something that no chain can compute.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | str | None = None) -> None:
        self.model = model
        self.forward: Callable[..., Any] = model  # runs the model, unless its own forward was replaced
        self.parts = parts_of(model)
        self.layers: list[nn.Module] = list(model.get_submodule(self.parts.layers))  # pyright: ignore[reportArgumentType]
        self.embedding = model.get_submodule(self.parts.embedding)
        loaded = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
        self.device = torch.device(device) if device else next(loaded, torch.device("cpu"))
        self._facts: Facts = find_facts(model, self.layers, self.embedding, self.device)
        self.calls_need_embeddings = self._facts.calls_need_embeddings

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings."""
        return self.embedding.weight.dtype  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    def dtype_at(self, cut: int) -> torch.dtype:
        """The dtype of the input of layer `cut`: fp32 in a bf16 model that keeps its residual in fp32."""
        return self._facts.forms[cut].dtype

    def width_at(self, cut: int) -> int:
        """The number of values per token in the input of layer `cut`; for `cut` = number of layers, of the
        tail.
        """
        return self._facts.forms[cut].width

    @property
    def hidden_size(self) -> int:
        """The number of values per token in the output of the last layer."""
        return self.width_at(len(self.layers))

    def lowest_cut(self, wanted: int) -> tuple[int, str | None]:
        """The highest possible cut up to `wanted`, and why it is not `wanted`.

        Layers that share state cannot be separated by the cut. Cuts with `lowest_cut(cut) == cut` also bound
        the spans of layers whose gradients flow into each other outside the hidden states.
        """
        cut, reason = wanted, None
        while over := [(giver, taker) for giver, taker in self._facts.links if giver < cut <= taker]:
            giver, taker = min(over)
            reason = f"layer {taker} uses values of layer {giver} other than its hidden states"
            cut = giver
        return cut, reason

    def rope_group(self, length: int) -> tuple[int, ...]:
        """Examples may share a padded batch only if this is equal; others would change their rotary
        tables.
        """
        return rope_group(self.model, length)

    def skeleton(
        self,
        input_ids: Int[Tensor, "batch sequence"],
        attention_mask: Int[Tensor, "batch sequence"] | None = None,
        *,
        embed: bool = True,
        graph: bool = False,
    ) -> Skeleton:
        """Runs the model's own forward without its layers.

        Args:
            input_ids: (batch, sequence) int64.
            attention_mask: (batch, sequence), or None.
            embed: Look up the embeddings; otherwise `embedded` is zeros, and the calls are the same.
            graph: Let gradients flow through `embedded` to the trained embeddings.
        """
        calls: list[Call] = []
        seen: list[Tensor] = []
        record = partial(self._record, calls, seen, {})
        forget_lengths(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(graph))
            stack.enter_context(contextlib.suppress(_AllRecorded))
            self._stand_in(stack, [record] * len(self.layers))
            if not (embed or self.calls_need_embeddings):
                self._skip_embeddings(stack)
            self._run(input_ids, attention_mask)
        return Skeleton(self._facts.forms[0].pack(seen[0]), tuple(calls))

    def layer(
        self,
        index: int,
        hidden: Float[Tensor, "batch sequence width"],
        call: Call,
        rows: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "batch sequence width_out"]:
        """Runs one layer by itself, in the gradient mode of the caller.

        `rows`: the flat positions at which the output of the last layer is needed; the others are undefined
        then.
        """
        if rows is not None and index == len(self.layers) - 1 and len(rows):
            with at_rows(self.layers[index], self._facts.alone, rows):
                return self.layer(index, hidden, call)
        given = self._facts.forms[index].unpack(hidden)
        args, kwargs = call.args, call.kwargs
        if self._facts.slots[index]:
            others = {
                place: given.get(place, call.left.get((index - 1, place)))
                for place in self._facts.slots[index]
            }
            args, kwargs = _filled((args, kwargs), others)
        out = self.layers[index](given[0], *args, **kwargs)
        for place in self._facts.slots.get(index + 1, ()):
            call.left[index, place] = out[place]
        return self._facts.forms[index + 1].pack(out)

    def tail(
        self, hidden: Float[Tensor, "batch sequence width"]
    ) -> Float[Tensor, "batch sequence vocabulary"]:
        """The logits for the output of the last layer; positions do not matter."""
        last = self._facts.forms[-1].unpack(hidden)[0]
        acts = [*[lambda hidden, *_: hidden] * (len(self.layers) - 1), lambda *_: last]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        forget_lengths(self.model)
        with contextlib.ExitStack() as stack:
            self._stand_in(stack, acts)
            self._skip_embeddings(stack)
            return self._run(ids, None).logits

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        return self.forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    def _stand_in(self, stack: contextlib.ExitStack, acts: list[Callable[..., Tensor]]) -> None:
        """Replaces the forwards of the layers until `stack` is closed; each `act` returns the hidden
        states.
        """
        for index, (layer, act) in enumerate(zip(self.layers, acts, strict=True)):
            stack.enter_context(replaced(layer, partial(self._forward, index, act)))

    def _forward(self, index: int, act: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Replaces a layer's own forward."""
        return self._result(index, act(*take_hidden(args, kwargs)))

    def _record(
        self,
        calls: list[Call],
        seen: list[Tensor],
        left: dict[tuple[int, int], Any],
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Records the arguments of a layer and returns its hidden states unchanged."""
        calls.append(Call(args, kwargs, left))
        seen.append(hidden)
        if len(calls) == len(self.layers):
            raise _AllRecorded  # stops before the tail, which would compute the logits of every token
        return hidden

    def _result(self, index: int, hidden: Tensor) -> Any:
        """Hidden states in the form of layer `index`'s result; a model that needs more of it fails."""
        kind, length = self._facts.results[index]
        if kind is Tensor:
            return hidden
        slots = self._facts.slots.get(index + 1, ())
        return kind([hidden, *(Slot(place) if place in slots else None for place in range(1, length))])

    def _skip_embeddings(self, stack: contextlib.ExitStack) -> None:
        """Returns zeros in place of embedded tokens; other embeddings run unless they are not loaded."""
        stack.enter_context(replaced(self.embedding, partial(self._zeros, self._facts.embedding_size)))
        for name in self.parts.names("embeddings"):
            module = self.model.get_submodule(name)
            if module is self.embedding or not any(weight.is_meta for weight in module.parameters()):
                continue
            table = isinstance(module, nn.Embedding)
            skip = partial(self._zeros, module.embedding_dim) if table else lambda hidden, *_, **__: hidden
            stack.enter_context(replaced(module, skip))

    def _zeros(self, size: int, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(*ids.shape, size, dtype=self.dtype, device=ids.device)


def _filled(value: Any, others: dict[int, Any]) -> Any:
    """`value` with every slot filled."""
    if isinstance(value, Slot):
        return others[value.place]
    if type(value) in (tuple, list):
        return type(value)(_filled(item, others) for item in value)
    if type(value) is dict:
        return {key: _filled(item, others) for key, item in value.items()}
    return value


def first_trained_layer(chain: Chain) -> int:
    """The cut: the first layer with a trained parameter; the number of layers if there is none."""
    trained = (any(p.requires_grad for p in layer.parameters()) for layer in chain.layers)
    return next((i for i, yes in enumerate(trained) if yes), len(chain.layers))


def run_layers(
    chain: Chain,
    indices: range,
    hidden: Float[Tensor, "batch sequence width"],
    calls: tuple[Call, ...],
    rows: Int[Tensor, " rows"] | None = None,
) -> Float[Tensor, "batch sequence width_out"]:
    """Runs layers one after the other; `rows` as in `Chain.layer`."""
    for index in indices:
        hidden = chain.layer(index, hidden, calls[index], rows)
    return hidden
