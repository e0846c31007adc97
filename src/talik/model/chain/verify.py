"""Compares a chain with the model's own forward, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from talik.base.errors import ChainError
from talik.model.chain.chain import Chain, Skeleton, first_trained_layer
from talik.model.chain.forms import evaluating, replaced, take_hidden
from talik.model.chain.rope import forget_lengths


@torch.no_grad()
def verify_chain(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | None = None,
) -> float:
    """The largest absolute difference between the model's own forward and the chain; 0.0 is correct.

    Runs every layer, below the cut with the calls of one skeleton and from the cut on with those of a fresh
    one; the tail; and every layer again in reverse order. The cut is the first layer with a trained parameter
    (the middle if all or none are trained), moved to a possible cut. Shapes and kernels are the same on both
    sides. Positions with `attention_mask` 0 are ignored; a difference that is not a number counts as inf.

    Raises:
        ChainError: The logits of a token depend on a later token.
    """
    check = _Check(Chain(model), input_ids, attention_mask)
    check.forward(lambda _: contextlib.nullcontext(), keep=True)
    check.backward()
    check.causal()
    return check.largest


@torch.no_grad()
def verify_layers(
    chain: Chain,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | None,
    around: Callable[[int], AbstractContextManager[Any]],
) -> float:
    """`verify_chain` for a model whose layers are not all loaded: each is loaded once, none runs in reverse.

    `around(i)` is entered before layer i runs in the model's own forward, and left after the chain's layer
    has been compared with it.
    """
    check = _Check(chain, input_ids, attention_mask)
    check.forward(around, keep=False)
    return check.largest


class _Check:
    """Compares a chain with one forward of the model."""

    def __init__(self, chain: Chain, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        self.chain, self.ids, self.mask = chain, input_ids, attention_mask
        counted = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.counted = counted.bool()
        self.cut = first_trained_layer(chain)
        if not 0 < self.cut < len(chain.layers):
            self.cut = len(chain.layers) // 2
        self.cut, _ = chain.lowest_cut(self.cut)
        self.largest = 0.0
        self.ours = torch.empty(0)  # output of the chain's last layer
        self.kept: list[Tensor] = []  # inputs of the layers and output of the last

    def compare(self, ours: Tensor, theirs: Tensor) -> None:
        gap = (ours - theirs).float()[self.counted].abs().max().item()
        self.largest = max(self.largest, float("inf") if gap != gap else gap)

    def forward(self, around: Callable[[int], AbstractContextManager[Any]], *, keep: bool) -> None:
        """The model's own forward, in which every layer is compared while it is loaded; and the tail."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.chain.model))
            self.whole: Skeleton = self.chain.skeleton(self.ids, self.mask)
            self.fresh: Skeleton = self.chain.skeleton(self.ids, self.mask, embed=False)
            self.ours = self.whole.embedded
            forget_lengths(self.chain.model)
            inner = stack.enter_context(contextlib.ExitStack())
            for index, layer in enumerate(self.chain.layers):
                compared = partial(self._compared, index, layer.forward, around, keep)
                inner.enter_context(replaced(layer, compared))
            plain = self.chain._run(self.ids, self.mask).logits
            inner.close()
            self.compare(self.chain.tail(self.ours), plain)
        self.kept.append(self.ours)

    def _compared(
        self,
        index: int,
        own: Callable[..., Any],
        around: Callable[[int], AbstractContextManager[Any]],
        keep: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Replaces a layer's own forward: runs it and the chain's layer, and compares them."""
        form, after = self.chain._facts.forms[index : index + 2]
        hidden, skeleton = self.ours, self.whole if index < self.cut else self.fresh
        given, _, _ = take_hidden(args, kwargs)
        self.compare(form.pieces[0].flat(given), form.pieces[0].flat(form.unpack(hidden)[0]))
        with around(index), replaced(self.chain.layers[index], own):
            out = own(*args, **kwargs)
            self.ours = self.chain.layer(index, hidden, skeleton.calls[index])
        self.compare(self.ours, after.pack(out))
        self.kept += [hidden] if keep else []
        return out

    def backward(self) -> None:
        """Runs every layer again, in reverse order."""
        with evaluating(self.chain.model):
            for index in reversed(range(len(self.chain.layers))):
                skeleton = self.whole if index < self.cut else self.fresh
                again = self.chain.layer(index, self.kept[index], skeleton.calls[index])
                self.compare(again, self.kept[index + 1])

    def causal(self) -> None:
        """Checks causality again with the real weights."""
        ends = self.counted.cumsum(1).argmax(1)  # the last token of each row
        rows = torch.arange(len(ends), device=ends.device)
        changed, before = self.ids.clone(), self.counted.clone()
        changed[rows, ends] = changed[rows, ends.clamp(min=1) - 1] + 1
        changed %= self.chain.embedding.weight.shape[0]  # pyright: ignore
        before[rows, ends] = False
        with evaluating(self.chain.model):
            one, other = (
                self.chain._run(ids, self.mask).logits[before].float() for ids in (self.ids, changed)
            )
        close = (
            1e-3 if self.chain.dtype == torch.float32 else 2e-2
        )  # products of experts may be split differently
        if (one - other).abs().max() > close * one.abs().max():
            raise ChainError("the model is not a causal decoder: a token's logits depend on later tokens")
