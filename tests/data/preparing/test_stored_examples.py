"""Examples in arrays: equal to the objects, in memory and from files; damaged files are refused."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import numpy as np
import pytest

from talik.data.examples import Example, Span
from talik.data.preparing.parts import PartDamagedError, joined, packed, read_part, write_part
from talik.data.preparing.stored_examples import (
    StoredExamples,
    examples_digest,
    ids_of,
    lengths_of,
    not_longer,
)
from talik.data.reading.rows import Place

FILES = [("one.jsonl", "line"), ("two.parquet", "row")]


def made(count: int, file: int, seed: int = 0) -> list[Example]:
    """Random examples of one file, of 2 to 40 tokens."""
    dice, found = random.Random(f"{seed} {file}"), []
    name, unit = FILES[file]
    for line in range(1, count + 1):
        length = dice.randint(2, 40)
        stops = sorted({*dice.sample(range(1, length + 1), dice.randint(1, min(4, length))), length})
        trained = dice.random() < 0.5
        spans = [
            Span(start, stop, trained ^ bool(n % 2))
            for n, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))
        ]
        ids = array("i", [dice.randrange(-1, 2**31) for _ in range(length)])
        found.append(Example(ids, tuple(spans), Place(name, line, unit)))  # pyright: ignore[reportArgumentType]
    return found


EXAMPLES = [*made(5000, 0), *made(60, 1)]
PARTS = [
    packed(EXAMPLES[:3000], 0, [0.1] * 3000, [0.2] * 3000),
    packed(EXAMPLES[3000:5000], 0, [0.3] * 2000, [0.4] * 2000),
    packed([], 1, [], []),
    packed(EXAMPLES[5000:], 1, [0.5] * 60, [0.6] * 60),
]
STORED = StoredExamples(PARTS, FILES)
SOME = [5, 5059, 3, 3000, 2999, 5, 5000]


def test_stored_examples_are_those_that_were_packed() -> None:
    assert list(STORED) == EXAMPLES
    assert STORED[2:5] == EXAMPLES[2:5] and STORED[-1] == EXAMPLES[-1]
    with pytest.raises(IndexError):
        STORED[len(EXAMPLES)]


def test_some_of_some_examples_in_any_order() -> None:
    some = STORED.at(SOME)
    assert list(some) == [EXAMPLES[i] for i in SOME]
    assert list(some.at([6, 0])) == [EXAMPLES[5000], EXAMPLES[5]]


@pytest.mark.parametrize("stored", [STORED, STORED.at(SOME), STORED.at([])])
def test_lengths_and_ids_without_objects(stored: StoredExamples) -> None:
    objects = list(stored)
    assert list(lengths_of(stored)) == list(lengths_of(objects)) == [e.length for e in objects]
    assert [ids_of(stored, i) for i in range(len(stored))] == [e.input_ids.tobytes() for e in objects]
    assert list(not_longer(stored, 20)) == not_longer(objects, 20) == [e for e in objects if e.length <= 20]


def test_the_digest_of_stored_examples_is_that_of_objects() -> None:
    assert examples_digest([STORED]) == examples_digest([EXAMPLES])
    assert examples_digest([STORED.at(SOME)]) == examples_digest([[EXAMPLES[i] for i in SOME]])
    assert examples_digest([STORED.at([])]) == examples_digest([[]])


def test_the_digest_names_tokens_masks_order_and_sets() -> None:
    whole, first = EXAMPLES[:8], EXAMPLES[0]
    token = Example(array("i", [*first.input_ids[:-1], 7]), first.spans, first.place)
    mask = Example(
        first.input_ids, tuple(Span(s.start, s.stop, not s.trained) for s in first.spans), first.place
    )
    cut = Example(first.input_ids, (Span(0, first.length, first.spans[0].trained),), first.place)
    others = [whole[::-1], whole[1:], [token, *whole[1:]], [mask, *whole[1:]], [cut, *whole[1:]]]
    digests = [examples_digest([some]) for some in (whole, *others)]
    digests.append(examples_digest([whole[:4], whole[4:]]))
    assert len(set(digests)) == len(digests)


def test_blocks_hold_every_column_across_parts() -> None:
    some = STORED.at(SOME)
    block = joined(list(some.blocks()))
    for name in ("question", "row", "file", "line", "trained"):
        assert np.array_equal(getattr(block, name), some.column(name))
    assert some.column("question").tolist() == [0.1, 0.5, 0.1, 0.3, 0.1, 0.1, 0.5]


def test_a_part_comes_back_from_its_file(tmp_path: Path) -> None:
    write_part(joined(PARTS), tmp_path / "part-00000", {"rows": 5060})
    part, about = read_part(tmp_path / "part-00000")
    assert list(StoredExamples([part], FILES)) == EXAMPLES and about == {"rows": 5060}
    write_part(PARTS[2], tmp_path / "empty", {})
    assert len(read_part(tmp_path / "empty")[0]) == 0


@pytest.mark.parametrize("damage", ["bit", "short", "no table", "no data", "half a table"])
def test_a_damaged_part_is_named(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "part-00000"
    write_part(PARTS[0], file, {})
    data, table = file.with_suffix(".bin"), file.with_suffix(".json")
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "bit":
        data.write_bytes(raw)
    elif damage == "short":
        data.write_bytes(raw[:-8])
    elif damage == "half a table":
        table.write_bytes(table.read_bytes()[:-40])
    else:
        (table if damage == "no table" else data).unlink()
    with pytest.raises(PartDamagedError):
        read_part(file)
