"""Facts about how a model calls its layers, from two watched forwards of different sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from talik.base.errors import ChainError, TalikError, UsageError
from talik.model.chain.forms import Form, Piece, first_of, piece_of
from talik.model.chain.probe import Seen, watch

SIZES = ((2, 5), (3, 7))  # (batch, sequence): different from each other and from sizes in models
CLOSE = 1e-3  # results count as equal if they differ by less than this share of the largest value


@dataclass(frozen=True, slots=True)
class Facts:
    """How a model calls its layers.

    Attributes:
        forms: The input of each layer, and the output of the last one.
        results: The type of each layer's result (Tensor, tuple or list) and its length.
        slots: For each layer, the places of the previous result that are among its arguments.
        links: Pairs (source, user) of layers that share state outside their results.
        alone: Modules of the last layer that need not run at every position (`positions`).
    """

    forms: tuple[Form, ...]
    results: tuple[tuple[type, int], ...]
    slots: dict[int, tuple[int, ...]]
    links: frozenset[tuple[int, int]]
    calls_need_embeddings: bool
    embedding_size: int
    alone: tuple[str, ...]


def find_facts(model: Any, layers: list[nn.Module], embedding: nn.Module, device: torch.device) -> Facts:
    """Watches two forwards.

    Raises:
        ChainError: The model cannot be run as a chain.
        UsageError: The config asks for something that no chain can compute.
    """
    name = type(model).__name__
    try:
        _check_config(model)
        one, other = (
            watch(model, layers, embedding, _tokens(model, size, device), alone=size == SIZES[-1])
            for size in SIZES
        )
        _check_order(one.order, len(layers))
        if one.problem:
            raise ChainError(one.problem)
        forms = _forms(one, other)
        _check_causal(forms[-1].pack(one.handed[-1]))
    except ChainError as error:
        raise ChainError(f"{name} is not a chain of layers: {error.problem}", remedy=error.remedy) from error
    except TalikError:
        raise
    except Exception as error:
        problem = f"{name} cannot be run on a few tokens: {type(error).__name__}: {str(error)[:300]}"
        raise ChainError(problem) from error
    packed = {(i, piece.place) for i, form in enumerate(forms) for piece in form.pieces}
    handed = {(taker - 1, taker) for taker, place in one.used if (taker, place) not in packed}
    return Facts(
        forms=forms,
        results=tuple(_result_of(out) for out in one.handed[1:]),
        slots={i: tuple(sorted(places)) for i, places in one.slots.items()},
        links=frozenset(one.links | handed),
        calls_need_embeddings=one.calls_need_embeddings,
        embedding_size=one.embedding_size,
        alone=other.alone if forms[-1].plain else (),
    )


def _check_config(model: Any) -> None:
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "output_router_logits", False):
        raise UsageError(
            "the config asks for output_router_logits, and the loss over them needs every layer in one graph",
            remedy="Set output_router_logits to false in the model's config.json.",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ChainError("it is an encoder-decoder, and Talik trains decoders")
    if isinstance(model.get_output_embeddings(), nn.ModuleList):
        raise ChainError("it is a decoder of sound: several codes at each position, and not one token")


def _tokens(model: Any, size: tuple[int, int], device: torch.device) -> Tensor:
    """Tokens for a few rows. The first two rows differ only in their last token."""
    batch, sequence = size
    most = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(3, 3 + sequence, device=device).repeat(batch, 1) % most
    ids[1, -1] = 3 + sequence
    return ids


def _check_order(order: list[int], count: int) -> None:
    if order == list(range(count)):
        return
    if missing := sorted(set(range(count)) - set(order)):
        raise ChainError(f"for text alone it does not call layers {', '.join(map(str, missing))}")
    if len(order) != len(set(order)):
        raise ChainError(f"its layers are called more than once, in the order {_shown(order)}")
    raise ChainError(f"its layers are called in the order {_shown(order)}")


def _shown(order: list[int]) -> str:
    return ", ".join(map(str, order[:12])) + (", ..." if len(order) > 12 else "")


def _forms(one: Seen, other: Seen) -> tuple[Form, ...]:
    """The inputs of all layers and the output of the last, each as vectors per token."""
    forms = []
    for index, pair in enumerate(zip(one.handed, other.handed, strict=True)):
        hidden = piece_of(0, first_of(pair[0]), first_of(pair[1]), SIZES)
        if hidden is None:
            shapes = " and ".join(str(tuple(first_of(out).shape)) for out in pair)
            problem = (
                f"the input of layer {index} is not a vector per token: {shapes} for two batches of {SIZES}"
            )
            raise ChainError(problem)
        extras = [_extra(place, *pair) for place in sorted(one.slots.get(index, ()))]
        forms.append(Form((hidden, *(piece for piece in extras if piece))))
    return tuple(forms)


def _extra(place: int, one: Any, other: Any) -> Piece | None:
    """Another result of a layer as vectors per token; None if it is not per token."""
    return piece_of(place, one[place], other[place], SIZES) if one[place].is_floating_point() else None


def _result_of(out: Any) -> tuple[type, int]:
    if isinstance(out, Tensor):
        return Tensor, 1
    return (list if isinstance(out, list) else tuple), len(out)


def _check_causal(hidden: Tensor) -> None:
    """Checks that outputs before the last token are equal in the first two rows, which differ only there."""
    before = hidden[:2, :-1].float()
    if not torch.isfinite(before).all():
        return
    if (before[0] - before[1]).abs().max() > CLOSE * before.abs().max():
        raise ChainError(
            "it is not a causal decoder: what it makes of a token depends on later ones",
            remedy="A model like BERT becomes one with is_decoder set to true in its config.json.",
        )
