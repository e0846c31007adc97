"""Holds the examples of consecutive rows as flat arrays, in memory or in a memory-mapped file.

    KEY/part-00000.bin     the arrays of some consecutive rows, one after the other
    KEY/part-00000.json    the position of each array, the checksum of the file, and counts of the rows

The JSON file is written last, so a part without one is incomplete.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from talik.base.files import atomic, read_json, write_text
from talik.data.examples import Example, Span
from talik.data.reading.rows import Place

# The arrays of a part and their types in the file.
TYPES = {
    "ids": "<i4",  # token ids, one example after the other
    "ends": "<i8",  # for each example, its end in `ids`
    "stops": "<i4",  # for each span, its end in its example
    "span_ends": "<i8",  # for each example, its end in `stops`
    "first": "|u1",  # for each example, 1 if its first span is trained
    "trained": "<i4",  # for each example, its number of trained tokens
    "file": "<i4",  # for each example, the index of its file
    "line": "<i8",  # for each example, the number of its line or row
    "question": "<f8",  # a draw in [0, 1), equal for equal questions (`question_draw`)
    "row": "<f8",  # a draw in [0, 1), different for each row (`row_draw`)
}
_ENDS = ("ends", "span_ends")  # arrays of positions that count from the start of the part
_PIECE = 1 << 20  # bytes that are read at a time for the checksum


class PartDamagedError(ValueError):
    """A part cannot be read as it was written; the message says why, without the file name."""


@dataclass(slots=True)
class Part:
    """The arrays of the examples of consecutive rows; `TYPES` describes them."""

    ids: Any
    ends: Any
    stops: Any
    span_ends: Any
    first: Any
    trained: Any
    file: Any
    line: Any
    question: Any
    row: Any

    def __len__(self) -> int:
        return len(self.ends)

    def ids_of(self, index: int) -> Any:
        """Returns the token ids of an example as an array."""
        return self.ids[self.ends[index - 1] if index else 0 : self.ends[index]]

    def example(self, index: int, files: Sequence[tuple[str, str]]) -> Example:
        """Returns the example at an index; `files` are the name and the unit of places of each file."""
        first = int(self.span_ends[index - 1]) if index else 0
        ids = array("i", self.ids_of(index).tobytes())
        spans: list[Span] = []
        at, trained = 0, bool(self.first[index])
        for stop in self.stops[first : int(self.span_ends[index])].tolist():
            spans.append(Span(at, stop, trained))
            at, trained = stop, not trained
        name, unit = files[int(self.file[index])]
        return Example(ids, tuple(spans), Place(name, int(self.line[index]), unit))  # pyright: ignore[reportArgumentType]


def packed(examples: Sequence[Example], file: int, questions: Sequence[float], rows: Sequence[float]) -> Part:
    """Packs examples of one file into a part.

    Args:
        examples: The examples.
        file: The index of their file.
        questions: For each example, the draw of its question.
        rows: For each example, the draw of its row.
    """
    stops = [span.stop for example in examples for span in example.spans]
    return Part(
        ids=np.frombuffer(b"".join(e.input_ids.tobytes() for e in examples), np.int32),
        ends=np.cumsum([e.length for e in examples], dtype=np.int64),
        stops=np.array(stops, np.int32),
        span_ends=np.cumsum([len(e.spans) for e in examples], dtype=np.int64),
        first=np.array([e.spans[0].trained for e in examples], np.uint8),
        trained=np.array([e.trained_tokens for e in examples], np.int32),
        file=np.full(len(examples), file, np.int32),
        line=np.array([e.place.line for e in examples], np.int64),
        question=np.array(questions, np.float64),
        row=np.array(rows, np.float64),
    )


def joined(parts: Sequence[Part]) -> Part:
    """Concatenates parts."""
    made: dict[str, Any] = {}
    for name, kind in TYPES.items():
        arrays = [getattr(part, name) for part in parts]
        if name in _ENDS:
            starts = np.cumsum([0, *(int(a[-1]) if len(a) else 0 for a in arrays)])
            arrays = [a + start for a, start in zip(arrays, starts[:-1], strict=True)]
        made[name] = np.concatenate(arrays) if arrays else np.zeros(0, kind)
    return Part(**made)


def write_part(part: Part, file: Path, about: dict[str, Any]) -> None:
    """Writes the arrays of a part to FILE.bin, then their table and `about` to FILE.json."""
    start = checksum = 0
    table: dict[str, list[int]] = {}
    with atomic(file.with_suffix(".bin")) as stream:
        for name, kind in TYPES.items():
            values = np.ascontiguousarray(getattr(part, name), kind).view(np.uint8)
            table[name] = [start, len(getattr(part, name))]
            for data in (values.data, bytes(-len(values) % 8)):  # arrays begin at multiples of 8 bytes
                start, checksum = start + len(data), crc32(data, checksum)
                stream.write(data)
    whole = {"size": start, "checksum": checksum, "arrays": table, "about": about}
    write_text(file.with_suffix(".json"), json.dumps(whole, ensure_ascii=False))


def read_part(file: Path, *, verify: bool = True) -> tuple[Part, dict[str, Any]]:
    """Reads a part whose arrays are memory-mapped.

    Args:
        file: The path of both files without a suffix.
        verify: True to compare all bytes with the checksum.

    Returns:
        The part, and the `about` that was written with it.

    Raises:
        PartDamagedError: The files are not as they were written.
    """
    data = file.with_suffix(".bin")
    try:
        whole = read_json(file.with_suffix(".json"))
        size, arrays, about = int(whole["size"]), dict(whole["arrays"]), dict(whole["about"])
        if data.stat().st_size != size:
            raise PartDamagedError("does not have the size in its table")
        if verify and _checksum(data) != whole["checksum"]:
            raise PartDamagedError("does not match its checksum")
        mapped: Any = np.asarray(np.memmap(data, np.uint8, "r")) if size else np.zeros(0, np.uint8)
        return Part(**{name: _array(mapped, arrays[name], kind) for name, kind in TYPES.items()}), about
    except PartDamagedError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PartDamagedError(f"cannot be read: {error}") from None


def _array(mapped: Any, place: Sequence[int], kind: str) -> Any:
    start, count = place
    return mapped[start : start + count * np.dtype(kind).itemsize].view(kind)


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(_PIECE):
            checksum = crc32(piece, checksum)
    return checksum


def gathered(part: Part, indices: Any) -> Part:
    """Copies the examples of a part at some indices into a new part."""
    made = {
        item.name: getattr(part, item.name)[indices]
        for item in fields(Part)
        if item.name not in ("ids", "stops", *_ENDS)
    }
    for values, ends in (("ids", "ends"), ("stops", "span_ends")):
        stops = getattr(part, ends)[indices]
        starts = np.where(indices, getattr(part, ends)[indices - 1], 0)
        sizes = stops - starts
        made[ends] = np.cumsum(sizes)
        # Source position of each value = its new position + the distance between the old and new start of its
        # example.
        positions = np.arange(int(sizes.sum())) + np.repeat(starts - made[ends] + sizes, sizes)
        made[values] = getattr(part, values)[positions]
    return Part(**made)
