"""Protocols between the step, the trunk's pass and the cache; the planner implements them without files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from talik.training.trunk.cache_shard import BatchGroup


@runtime_checkable
class HiddenStates(Protocol):
    """The trunk's hidden states of a set of examples."""

    def read(self, indices: Sequence[int], /) -> Float[Tensor, "batch sequence width"]:
        """The hidden states of these examples, right-padded with zeros, on the CPU."""
        ...


@runtime_checkable
class Shard(Protocol):
    """Receives the trunk's hidden states."""

    def write(self, group: BatchGroup, hidden: Float[Tensor, "batch sequence width"], /) -> None:
        """Takes the hidden states of one batch group, from any device."""
        ...


@runtime_checkable
class StatesCache(Protocol):
    """A cache that the trunk's pass writes to."""

    def new_shard(self, groups: Sequence[BatchGroup], /) -> AbstractContextManager[Shard]:
        """A shard for these batch groups, finished when the context ends without an error."""
        ...
