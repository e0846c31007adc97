"""Tests each function that reads the records of a forward, on short lists made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from talik.base.errors import ChainError
from talik.model.chain.probe import created, seen_in, watch
from talik.model.chain.records import (
    BETWEEN,
    TAIL_NEEDS_EMBEDDINGS,
    TAIL_NEEDS_MORE,
    Birth,
    Embedded,
    LayerEnd,
    LayerStart,
    Op,
    Record,
    births_in,
    calls_need_embeddings,
    embedded_in,
    handed_in,
    is_same,
    order_in,
    problems_in,
    slots_in,
    steps_in,
    uses_in,
)
from talik.model.chain.stand_ins import writes_in_place

TOKENS, FIRST, SECOND, LOGITS = (torch.full((2, 3), float(i)) for i in range(4))
KEYS, EXTRA, MASK = (torch.full((3,), float(i)) for i in range(3))


def layer(index: int, hidden: Tensor, *ops: Op, gives: Any, others: tuple[Tensor, ...] = ()) -> list[Record]:
    return [LayerStart(index, hidden, others), *ops, LayerEnd(index, gives)]


def forward(*tail: Record, between: tuple[Record, ...] = ()) -> list[Record]:
    """Two layers; the first makes keys that are not in its result."""
    return [
        Embedded(TOKENS),
        *layer(0, TOKENS, Op("relu", 0, (TOKENS,), (FIRST,)), Op("exp", 0, (TOKENS,), (KEYS,)), gives=FIRST),
        *between,
        *layer(1, FIRST, Op("relu", 1, (FIRST,), (SECOND,)), gives=SECOND),
        *tail,
    ]


def test_the_order_and_the_results_of_layers() -> None:
    records = forward()
    assert order_in(records) == [0, 1]
    assert [id(value) for value in handed_in(records)] == [id(TOKENS), id(FIRST), id(SECOND)]
    assert order_in([*records, *layer(0, SECOND, gives=FIRST)]) == [0, 1, 0]
    assert order_in([]) == handed_in([]) == []


def test_steps_know_the_calls_and_the_result_before_them() -> None:
    steps = list(steps_in(forward(Op("exp", None, (SECOND,), (LOGITS,)))))
    assert [step.started for step in steps] == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert [id(step.before) for step in steps] == [
        id(value) for value in (None, *[TOKENS] * 4, *[FIRST] * 3, SECOND)
    ]


def test_births_are_in_layers_and_the_first_counts() -> None:
    again = [*forward(Op("exp", None, (SECOND,), (LOGITS,))), Op("add_", 1, (KEYS,), (KEYS,))]
    assert births_in(again) == {FIRST: Birth(2, 0), KEYS: Birth(3, 0), SECOND: Birth(6, 1)}
    assert births_in(layer(3, TOKENS, gives=(FIRST, KEYS)))[KEYS] == Birth(1, 3), "a result is of its layer"


def test_slots_are_the_places_of_the_previous_result_among_the_arguments() -> None:
    records = [
        *layer(0, TOKENS, gives=(FIRST, EXTRA, KEYS), others=(MASK,)),
        *layer(1, FIRST, gives=SECOND, others=(MASK, KEYS)),
    ]
    assert slots_in(records) == {0: set(), 1: {2}}


@pytest.mark.parametrize(
    ("ops", "used", "links"),
    [
        ((Op("add", 1, (FIRST,), (SECOND,)),), set(), set()),
        ((Op("add", 1, (FIRST, EXTRA), (SECOND,)),), {(1, 1)}, set()),
        ((Op("add", 1, (FIRST, KEYS), (SECOND,)),), set(), {(0, 1)}),
        ((Op("item", 1, (KEYS,)),), set(), {(0, 1)}),
        ((Op("add", 1, (FIRST[:], MASK), (SECOND,)),), set(), set()),
        ((Op("exp", 1, (TOKENS,), (LOGITS,)), Op("exp", 1, (LOGITS,), (SECOND,))), set(), set()),
    ],
    ids=["hidden states", "a slot", "shared state", "a value that is read", "a view", "its own"],
)
def test_what_a_layer_computes_with(ops: tuple[Op, ...], used: set[Any], links: set[Any]) -> None:
    makes_keys = Op("exp", 0, (TOKENS,), (KEYS,))
    records = [
        *layer(0, TOKENS, makes_keys, gives=(FIRST, EXTRA)),
        *layer(1, FIRST, *ops, gives=SECOND, others=(EXTRA,)),
    ]
    assert uses_in(records) == (used, links)


def test_a_tensor_that_a_later_layer_changes_is_not_of_that_layer_before() -> None:
    records = [
        *layer(0, TOKENS, Op("add", 0, (TOKENS, MASK), (FIRST,)), gives=FIRST),
        *layer(1, FIRST, Op("add_", 1, (MASK,), (MASK,)), gives=SECOND),
        *layer(2, SECOND, Op("add", 2, (SECOND, MASK), (LOGITS,)), gives=LOGITS),
    ]
    assert uses_in(records) == (set(), {(1, 2)})


@pytest.mark.parametrize(
    ("records", "problems"),
    [
        (forward(Op("exp", None, (SECOND,), (LOGITS,))), []),
        (forward(Op("exp", None, (SECOND[:],), (LOGITS,))), []),
        (forward(between=(Op("exp", None, (FIRST,), (LOGITS,)),)), [BETWEEN]),
        (forward(between=(Op("exp", None, (MASK,), (LOGITS,)),)), []),
        ([*layer(0, TOKENS, gives=FIRST), *layer(1, LOGITS, gives=SECOND)], [BETWEEN]),
        (forward(Op("exp", None, (KEYS,), (LOGITS,))), [TAIL_NEEDS_MORE]),
        (forward(Op("add", None, (SECOND, TOKENS), (LOGITS,))), [TAIL_NEEDS_EMBEDDINGS]),
        (forward(between=(Op("exp", None, (TOKENS,), (LOGITS,)),)), []),
        (
            forward(Op("exp", None, (KEYS,)), Op("exp", None, (TOKENS,))),
            [TAIL_NEEDS_MORE, TAIL_NEEDS_EMBEDDINGS],
        ),
    ],
)
def test_problems(records: list[Record], problems: list[str]) -> None:
    assert list(problems_in(records, 2)) == problems
    assert seen_in(records, 2).problem == (problems[0] if problems else None)


def test_embedded_tokens_are_followed_outside_the_layers_only() -> None:
    scaled = Op("mul", None, (TOKENS,), (EXTRA,))
    records = [*forward(), scaled, Op("exp", None, (EXTRA,), (MASK,))]
    assert embedded_in(records) == {TOKENS: 0, EXTRA: 8, MASK: 9}


@pytest.mark.parametrize(
    ("records", "needed"),
    [
        ([*layer(0, TOKENS, gives=FIRST, others=(MASK,))], False),
        ([*layer(0, TOKENS, gives=FIRST, others=(TOKENS,))], True),
        ([Op("mul", None, (TOKENS,), (EXTRA,)), *layer(0, TOKENS, gives=FIRST, others=(EXTRA,))], True),
        ([Op("item", None, (TOKENS,))], True),
        ([Op("item", None, (MASK,))], False),
        ([Op("exp", None, (TOKENS,), (EXTRA,))], False),
        ([Op("item", 0, (TOKENS,))], False),
    ],
)
def test_calls_that_need_embeddings(records: list[Record], needed: bool) -> None:
    assert calls_need_embeddings([Embedded(TOKENS), *records]) is needed


def test_a_view_of_all_of_a_tensor_is_the_same() -> None:
    assert is_same(FIRST, FIRST) and is_same(FIRST, FIRST[:, :]) and is_same(FIRST.view(2, 3), FIRST)
    assert not any(is_same(FIRST, other) for other in (FIRST[:1], FIRST.clone(), FIRST.view(3, 2), FIRST.mT))
    assert not is_same(torch.empty(0), torch.empty(0)) and not is_same(FIRST.to("meta"), FIRST.to("meta"))


def test_a_function_creates_what_it_does_not_pass_on() -> None:
    assert [id(t) for t in created("split", [FIRST], (FIRST, SECOND))] == [id(SECOND)]
    assert not list(created("contiguous", [FIRST], FIRST[:]))
    assert [id(t) for t in created("add_", [FIRST], FIRST)] == [id(FIRST)]


def test_the_names_of_functions_that_write() -> None:
    writing = ["add_", "copy_", "__setitem__", "__iadd__", "__imul__", "__ior__"]
    assert all(map(writes_in_place, writing))
    reading = ["add", "linear", "__index__", "__int__", "__invert__", "__getitem__", "__get__"]
    assert not any(map(writes_in_place, reading))


class Decoder(nn.Module):
    """An embedding and two layers."""

    def __init__(self, writes: bool = False, reads: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.writes, self.reads = writes, reads

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        hidden = self.embed(input_ids)
        if self.reads and hidden.sum() == 0.5:
            return hidden
        for layer in self.layers:
            hidden = layer(hidden)
        if self.writes:
            self.layers[0].weight.mul_(2)  # pyright: ignore
        return hidden.softmax(-1)


def test_a_model_is_recorded_and_left_as_it_was() -> None:
    model, ids = Decoder(), torch.arange(10).view(2, 5)
    before = dict(model.named_parameters())
    seen = watch(model, list(model.layers), model.embed, ids, alone=True)
    assert (seen.order, seen.slots, seen.problem, seen.embedding_size) == (
        [0, 1],
        {0: set(), 1: set()},
        None,
        4,
    )
    assert [out.shape for out in seen.handed] == [(2, 5, 4)] * 3
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_changes_its_weights_is_refused_before_the_change() -> None:
    model = Decoder(writes=True)
    with pytest.raises(ChainError, match="its forward changes its own weights"):
        watch(model, list(model.layers), model.embed, torch.arange(10).view(2, 5))


def test_a_value_of_embedded_tokens_that_the_forward_reads_is_recorded() -> None:
    ids = torch.arange(10).view(2, 5)
    seen = [watch(model, list(model.layers), model.embed, ids) for model in (Decoder(), Decoder(reads=True))]
    assert [one.calls_need_embeddings for one in seen] == [False, True]
