"""The records of one forward, and pure functions that find in them how the layers are called.

`probe` makes the list of records. The tests make short lists by hand, without a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from talik.model.chain.forms import first_of, tensors_in

# Functions that read the values of tensors.
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose", "is_nonzero"}

BETWEEN = "it computes with hidden states between its layers"
TAIL_NEEDS_MORE = "its tail needs more than the result of the last layer"
TAIL_NEEDS_EMBEDDINGS = "its tail needs the embedded tokens"


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """A torch function that computes with the values of tensors.

    Attributes:
        name: The name of the function.
        layer: The layer that calls it; None outside the layers.
        reads: The tensors among its arguments.
        writes: The tensors that it creates or changes.
    """

    name: str
    layer: int | None
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class LayerStart:
    """A layer is called, with hidden states and other tensors."""

    layer: int
    hidden: Tensor
    others: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class LayerEnd:
    """A layer returns its result."""

    layer: int
    result: Any


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """The table of the input tokens returns vectors."""

    vectors: Tensor


# The records hold their tensors, so that no tensor is freed and `is` and `id` identify each one.
Record = Op | LayerStart | LayerEnd | Embedded


@dataclass(frozen=True, slots=True)
class Step:
    """A record and the state of the forward just before it.

    Attributes:
        position: The number of records before this one.
        record: The record.
        started: The number of layer calls before this record.
        before: The latest result of a layer; before the first result, the input of the first layer.
    """

    position: int
    record: Record
    started: int
    before: Any


@dataclass(frozen=True, slots=True)
class Birth:
    """The position of the record in which a tensor was created or first changed, and its layer."""

    position: int
    layer: int


def steps_in(records: Sequence[Record]) -> Iterator[Step]:
    """Every record with the state of the forward just before it."""
    started, before = 0, None
    for position, record in enumerate(records):
        if isinstance(record, LayerStart) and not started:
            before = record.hidden
        yield Step(position, record, started, before)
        if isinstance(record, LayerStart):
            started += 1
        elif isinstance(record, LayerEnd):
            before = record.result


def order_in(records: Sequence[Record]) -> list[int]:
    """The layers in the order of their calls."""
    return [record.layer for record in records if isinstance(record, LayerStart)]


def handed_in(records: Sequence[Record]) -> list[Any]:
    """The input of the first layer, and the whole result of every layer."""
    inputs = [record.hidden for record in records if isinstance(record, LayerStart)]
    return [*inputs[:1], *(record.result for record in records if isinstance(record, LayerEnd))]


def slots_in(records: Sequence[Record]) -> dict[int, set[int]]:
    """For every layer, the places of the previous result that are among its arguments."""
    slots: dict[int, set[int]] = {}
    for step in steps_in(records):
        if isinstance(step.record, LayerStart):
            places = _places(step.before)
            slots[step.record.layer] = {places[t] for t in step.record.others if t in places}
    return slots


def uses_in(records: Sequence[Record]) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """The pairs (layer, slot) and the links (source, user) of tensors that layers compute with (`Seen`)."""
    births = births_in(records)
    used: set[tuple[int, int]] = set()
    links: set[tuple[int, int]] = set()
    for step in steps_in(records):
        if not isinstance(step.record, Op) or step.record.layer is None:
            continue
        user, places = step.record.layer, _places(step.before)
        for tensor in step.record.reads:
            if tensor in places:
                used.add((user, places[tensor]))
                continue
            source = _source(births, tensor, step.position)
            if source not in (None, user) and not is_same(tensor, first_of(step.before)):
                links.add((source, user))
    return used, links


def problems_in(records: Sequence[Record], layers: int) -> Iterator[str]:
    """Everything that a chain of so many layers, called in their order, cannot do."""
    births, embedded = births_in(records), embedded_in(records)
    for step in steps_in(records):
        record = step.record
        if not step.started:
            continue
        if isinstance(record, LayerStart) and not is_same(record.hidden, first_of(step.before)):
            yield BETWEEN
        if not isinstance(record, Op) or record.layer is not None:
            continue
        of_layers = [t for t in record.reads if _source(births, t, step.position) is not None]
        if step.started < layers and of_layers:
            yield BETWEEN
        elif any(not is_same(tensor, first_of(step.before)) for tensor in of_layers):
            yield TAIL_NEEDS_MORE
        elif step.started == layers and _any_before(embedded, record.reads, step.position):
            yield TAIL_NEEDS_EMBEDDINGS


def calls_need_embeddings(records: Sequence[Record]) -> bool:
    """True if a layer's other arguments, or a value read outside the layers, come from embedded tokens."""
    embedded = embedded_in(records)
    for position, record in enumerate(records):
        tensors: tuple[Tensor, ...] = ()
        if isinstance(record, LayerStart):
            tensors = record.others
        elif isinstance(record, Op) and record.layer is None and record.name in READS:
            tensors = record.reads
        if _any_before(embedded, tensors, position):
            return True
    return False


def births_in(records: Sequence[Record]) -> dict[Tensor, Birth]:
    """The births of all tensors that layers create, change or return; of each the first one."""
    births: dict[Tensor, Birth] = {}
    for position, record in enumerate(records):
        if isinstance(record, LayerEnd):
            layer, made = record.layer, tuple(tensors_in(record.result))
        elif isinstance(record, Op) and record.layer is not None:
            layer, made = record.layer, record.writes
        else:
            continue
        for tensor in made:
            births.setdefault(tensor, Birth(position, layer))
    return births


def embedded_in(records: Sequence[Record]) -> dict[Tensor, int]:
    """The positions of the records that create embedded tokens, or compute from them outside the layers."""
    embedded: dict[Tensor, int] = {}
    for position, record in enumerate(records):
        if isinstance(record, Embedded):
            embedded.setdefault(record.vectors, position)
        elif isinstance(record, Op) and record.layer is None and any(t in embedded for t in record.reads):
            for tensor in record.writes:
                embedded.setdefault(tensor, position)
    return embedded


def _places(result: Any) -> dict[Tensor, int]:
    """The tensors of a layer's result other than the hidden states, with their places."""
    if not isinstance(result, (tuple, list)):
        return {}
    return {t: place for place, t in enumerate(result) if place and isinstance(t, Tensor)}


def _source(births: dict[Tensor, Birth], tensor: Tensor, position: int) -> int | None:
    """The layer that created a tensor before this position."""
    birth = births.get(tensor)
    return birth.layer if birth is not None and birth.position < position else None


def _any_before(positions: dict[Tensor, int], tensors: Sequence[Tensor], position: int) -> bool:
    return any(positions.get(tensor, position) < position for tensor in tensors)


def is_same(one: Tensor, other: Tensor) -> bool:
    """True if both are one tensor, or one is a view of all of the other (`hidden[:, :]`)."""
    if one is other:
        return True
    alike = (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    return alike and not one.is_meta and one.numel() > 0 and one.data_ptr() == other.data_ptr()
