"""Blocks of weights in and out of a device. The step asks a store for every block that it touches.

A block is named "embeddings", "layer 17" or "tail". After `get` the block's parameters may be computed with;
`release` ends that; `put` says that they were changed; `read_ahead` says which block is next.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Store(Protocol):
    """Where a block's weights come from."""

    def get(self, block: str) -> None: ...
    def put(self, block: str) -> None: ...
    def read_ahead(self, block: str) -> None: ...
    def release(self, block: str) -> None: ...


class ResidentStore:
    """The model's own parameters, which stay where they are: nothing moves."""

    def get(self, block: str) -> None:
        pass

    def put(self, block: str) -> None:
        pass

    def read_ahead(self, block: str) -> None:
        pass

    def release(self, block: str) -> None:
        pass
