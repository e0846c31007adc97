"""Blocks and their text."""

from __future__ import annotations

import pytest

from talik.model.block import EMBEDDINGS, REST, TAIL, Block


@pytest.mark.parametrize(
    ("block", "text"),
    [(Block.layer(17), "layer 17"), (EMBEDDINGS, "embeddings"), (TAIL, "tail"), (REST, "rest")],
)
def test_a_block_is_read_from_its_text(block: Block, text: str) -> None:
    assert str(block) == text and Block.parse(text) == block


@pytest.mark.parametrize("text", ["", "layer", "layer x", "tail 3", "norm", "layers 3"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a block"):
        Block.parse(text)


@pytest.mark.parametrize(
    ("part", "block"),
    [
        ("layer 0", Block.layer(0)),
        ("norm", TAIL),
        ("head", TAIL),
        ("embeddings", EMBEDDINGS),
        ("other", REST),
        ("beside", REST),
    ],
)
def test_the_block_of_a_part(part: str, block: Block) -> None:
    assert Block.of_part(part) == block
