"""The blocks of a model: the embeddings, each layer, the tail, and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

BlockKind = Literal["embeddings", "layer", "tail", "rest"]


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a model, the unit in which weights are loaded, trained and written.

    Attributes:
        kind: "embeddings" is the table of the input tokens, "tail" the final norm and the head, "rest" all
            other tensors outside the layers (learned positions, norms of the embeddings; often empty).
        index: The number of a layer, from 0; None for the other kinds.
    """

    kind: BlockKind
    index: int | None = None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind} {self.index}"

    @classmethod
    def layer(cls, index: int) -> Block:
        """The block of one layer."""
        return cls("layer", index)

    @classmethod
    def parse(cls, text: str) -> Block:
        """Reads a block from its text, for example "layer 17" or "tail".

        Raises:
            ValueError: The text names no block.
        """
        kind, _, index = text.partition(" ")
        if kind not in get_args(BlockKind) or (kind == "layer") != index.isdecimal():
            raise ValueError(f"{text!r} is not the name of a block")
        return cls.layer(int(index)) if index else cls(cast(BlockKind, kind))

    @classmethod
    def of_part(cls, part: str) -> Block:
        """The block that holds a part of the model, as `Parts.part` names it ("layer 17", "norm", "head")."""
        if part in ("norm", "head"):
            return TAIL
        return cls.parse(part) if part == "embeddings" or part.startswith("layer ") else REST


EMBEDDINGS, TAIL, REST = Block("embeddings"), Block("tail"), Block("rest")
