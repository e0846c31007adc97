"""Sequences of examples that are stored as flat arrays: an `Example` object is made when it is asked for."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from talik.data.examples import Example
from talik.data.preparing.parts import TYPES, Part, gathered, joined, packed

_BLOCK = 4096  # examples that are copied at a time


class _Examples(Sequence[Example], ABC):
    """A sequence of examples that are made when they are asked for."""

    @property
    @abstractmethod
    def lengths(self) -> array[int]:
        """The number of tokens of each example."""

    @abstractmethod
    def _example(self, index: int) -> Example:
        """Makes the example at an index, which may be negative; IndexError if there is none."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._example(i) for i in range(*index.indices(len(self)))]
        return self._example(index)


class StoredExamples(_Examples):
    """The examples of some parts, all of them or those at some indices.

    Args:
        parts: The arrays.
        files: The name of each file, and the unit of its places: "line" or "row".
        indices: The indices of the examples among all, in order; None: all of them.
    """

    def __init__(self, parts: Sequence[Part], files: Sequence[tuple[str, str]], indices: Any = None) -> None:
        self._parts, self._files = list(parts), list(files)
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)]).tolist()
        self._indices = indices
        self._lengths: array[int] | None = None

    def column(self, name: str) -> Any:
        """Returns an array with an entry for each example: one of `TYPES`, or "length"."""
        if name == "length":
            columns: list[Any] = [np.diff(part.ends, prepend=0).astype(np.int32) for part in self._parts]
        else:
            columns = [getattr(part, name) for part in self._parts]
        whole = np.concatenate(columns) if columns else np.zeros(0, np.int32)
        return whole if self._indices is None else whole[self._indices]

    @property
    def lengths(self) -> array[int]:
        """The number of tokens of each example."""
        if self._lengths is None:
            self._lengths = array("i", np.ascontiguousarray(self.column("length")).tobytes())
        return self._lengths

    def at(self, indices: Any) -> StoredExamples:
        """Returns the examples at some indices, in that order."""
        own = indices if self._indices is None else self._indices[indices]
        return StoredExamples(self._parts, self._files, np.asarray(own, np.int64))

    def ids(self, index: int) -> bytes:
        """Returns the token ids of an example as bytes."""
        part, at = self._locate(index)
        return part.ids_of(at).tobytes()

    def blocks(self) -> Iterator[Part]:
        """Yields all examples in order, some thousands at a time, copied into new parts."""
        for start in range(0, len(self), _BLOCK):
            own = np.arange(start, min(start + _BLOCK, len(self)))
            own = own if self._indices is None else self._indices[own]
            numbers = np.searchsorted(self._starts, own, side="right") - 1
            cuts = np.flatnonzero(np.diff(numbers)) + 1
            runs = zip(np.split(numbers, cuts), np.split(own, cuts), strict=True)
            parts: list[tuple[Part, Any]] = [
                (self._parts[part[0]], at - self._starts[part[0]]) for part, at in runs
            ]
            yield joined([gathered(part, at) for part, at in parts])

    def _locate(self, index: int) -> tuple[Part, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = index % len(self)
        at = at if self._indices is None else int(self._indices[at])
        number = bisect_right(self._starts, at) - 1
        return self._parts[number], at - self._starts[number]

    def __len__(self) -> int:
        return self._starts[-1] if self._indices is None else len(self._indices)

    def _example(self, index: int) -> Example:
        part, at = self._locate(index)
        return part.example(at, self._files)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


class JoinedExamples(_Examples):
    """The examples of two sets, one set after the other."""

    def __init__(self, first: Sequence[Example], second: Sequence[Example]) -> None:
        self._first, self._second = first, second
        self._lengths = array("i", [*lengths_of(first), *lengths_of(second)])

    @property
    def lengths(self) -> array[int]:
        """The number of tokens of each example."""
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def _example(self, index: int) -> Example:
        at, before = range(len(self))[index], len(self._first)
        return self._first[at] if at < before else self._second[at - before]


def examples_digest(sets: Sequence[Sequence[Example]]) -> str:
    """Returns a digest of 32 hexadecimal digits over all tokens and masks, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for examples in sets:
        digest.update(len(examples).to_bytes(8, "little"))
        for part in _stored(examples).blocks():
            for name in ("ends", "ids", "span_ends", "stops", "first"):
                digest.update(np.ascontiguousarray(getattr(part, name), TYPES[name]).tobytes())
    return digest.hexdigest()


def _stored(examples: Sequence[Example]) -> StoredExamples:
    if isinstance(examples, StoredExamples):
        return examples
    nothing = [0.0] * len(examples)
    return StoredExamples([packed(examples, 0, nothing, nothing)], [("", "line")])


def lengths_of(examples: Sequence[Example]) -> Sequence[int]:
    """Returns the number of tokens of each example without making the examples."""
    if isinstance(examples, StoredExamples | JoinedExamples):
        return examples.lengths
    return array("i", [example.length for example in examples])


def lengths_at(examples: Sequence[Example], indices: Sequence[int]) -> list[int]:
    """Returns the number of tokens of the examples at some indices without making them."""
    if isinstance(examples, StoredExamples | JoinedExamples):
        return [examples.lengths[index] for index in indices]
    return [examples[index].length for index in indices]


def ids_of(examples: Sequence[Example], index: int) -> bytes:
    """Returns the token ids of an example as bytes without making the example."""
    return (
        examples.ids(index) if isinstance(examples, StoredExamples) else examples[index].input_ids.tobytes()
    )


def not_longer(examples: Sequence[Example], limit: int) -> Sequence[Example]:
    """Returns the examples of at most `limit` tokens."""
    chosen = np.flatnonzero(np.asarray(lengths_of(examples)) <= limit)
    if isinstance(examples, StoredExamples):
        return examples.at(chosen)
    return [examples[index] for index in chosen.tolist()]
