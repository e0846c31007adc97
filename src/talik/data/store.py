"""Examples in flat arrays: in memory, or in files that are mapped, so that millions of them take no memory.

    KEY/part-00000/ids.bin      token ids, 32-bit, one example after the other
    KEY/part-00000/table.npz    where each example and each span ends, its row, and the draws for shares
    KEY/part-00000/about.json   counts, and the digest of ids.bin

A part appears once it is whole, so preparation that was broken off goes on after the last part.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, overload

import numpy as np

from talik.data.examples import Example, Span
from talik.data.rows import Place

# Arrays of a part beside the ids: their names and types.
_TABLE = {
    "ends": np.int64,  # of each example in the ids
    "stops": np.int32,  # of each span in its example
    "span_ends": np.int64,  # of each example in the stops
    "first": np.uint8,  # whether the first span is trained
    "trained": np.int32,  # trained tokens
    "file_number": np.int32,
    "line": np.int64,
    "question": np.float64,  # a draw in [0, 1), the same for the same question
    "row": np.float64,  # a draw in [0, 1) for the row
}


@dataclass(slots=True)
class Part:
    """Examples of consecutive rows, as arrays; the attributes are those of `_TABLE`."""

    ids: Any
    ends: Any
    stops: Any
    span_ends: Any
    first: Any
    trained: Any
    file_number: Any
    line: Any
    question: Any
    row: Any

    def __len__(self) -> int:
        return len(self.ends)

    def example(self, index: int, files: Sequence[tuple[str, str]]) -> Example:
        """The example at an index; `files` are the names and units of places."""
        start = int(self.ends[index - 1]) if index else 0
        first = int(self.span_ends[index - 1]) if index else 0
        ids = array("i")
        ids.frombytes(self.ids[start : int(self.ends[index])].tobytes())
        spans, at, trained = [], 0, bool(self.first[index])
        for stop in self.stops[first : int(self.span_ends[index])].tolist():
            spans.append(Span(at, stop, trained))
            at, trained = stop, not trained
        name, unit = files[int(self.file_number[index])]
        return Example(ids, tuple(spans), Place(name, int(self.line[index]), unit))  # pyright: ignore[reportArgumentType]


def packed(examples: Sequence[Example], file: int, questions: Sequence[float], rows: Sequence[float]) -> Part:
    """A part of examples of one file, with the draws of each."""
    stops = [span.stop for example in examples for span in example.spans]
    return Part(
        ids=np.frombuffer(b"".join(e.input_ids.tobytes() for e in examples), np.int32),
        ends=np.cumsum([e.length for e in examples], dtype=np.int64),
        stops=np.array(stops, np.int32),
        span_ends=np.cumsum([len(e.spans) for e in examples], dtype=np.int64),
        first=np.array([e.spans[0].trained for e in examples], np.uint8),
        trained=np.array([e.trained_tokens for e in examples], np.int32),
        file_number=np.full(len(examples), file, np.int32),
        line=np.array([e.place.line for e in examples], np.int64),
        question=np.array(questions, np.float64),
        row=np.array(rows, np.float64),
    )


def joined(parts: Sequence[Part]) -> Part:
    """Parts as one."""
    made: dict[str, Any] = {}
    for name in (item.name for item in fields(Part)):
        arrays = [getattr(part, name) for part in parts]
        if name in ("ends", "span_ends"):
            starts = np.cumsum([0, *(int(a[-1]) if len(a) else 0 for a in arrays)])
            arrays = [a + start for a, start in zip(arrays, starts[:-1], strict=True)]
        made[name] = np.concatenate(arrays) if arrays else np.zeros(0, _TABLE.get(name, np.int32))
    return Part(**made)


def write_part(part: Part, folder: Path, about: dict[str, Any]) -> None:
    """Writes a part into a folder that is there and empty."""
    with (folder / "ids.bin").open("wb") as file:
        file.write(np.ascontiguousarray(part.ids).tobytes())
    np.savez(folder / "table.npz", **{name: getattr(part, name) for name in _TABLE})
    (folder / "about.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")


def read_part(folder: Path) -> tuple[Part, dict[str, Any]]:
    """A part that was written; its ids are mapped, not read. Raises OSError, ValueError or KeyError."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    with np.load(folder / "table.npz", allow_pickle=False) as table:
        arrays = {name: table[name].astype(kind, copy=False) for name, kind in _TABLE.items()}
    size = (folder / "ids.bin").stat().st_size
    if size != 4 * (int(arrays["ends"][-1]) if len(arrays["ends"]) else 0):
        raise ValueError("ids.bin has another size than its table says")
    ids: Any = np.memmap(folder / "ids.bin", np.int32, "r") if size else np.zeros(0, np.int32)
    return Part(ids=ids, **arrays), about


class StoredExamples(Sequence[Example]):
    """Examples of some parts, all of them or those at some indices; each is made when it is asked for.

    Attributes:
        lengths: Tokens of each example.
    """

    def __init__(self, parts: Sequence[Part], files: Sequence[tuple[str, str]], indices: Any = None) -> None:
        self._parts, self._files = list(parts), list(files)
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)]).tolist()
        self._indices = indices

    def column(self, name: str) -> Any:
        """One of the arrays of the table, or the lengths, for these examples."""
        if name == "length":
            columns = [np.diff(part.ends, prepend=0) for part in self._parts]
        else:
            columns = [getattr(part, name) for part in self._parts]
        whole = np.concatenate(columns) if columns else np.zeros(0, np.int64)
        return whole if self._indices is None else whole[self._indices]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self.column("length").tolist()

    def at(self, indices: Any) -> StoredExamples:
        """The examples at these indices of all examples, in that order."""
        own = indices if self._indices is None else self._indices[indices]
        return StoredExamples(self._parts, self._files, np.asarray(own, np.int64))

    def __len__(self) -> int:
        return self._starts[-1] if self._indices is None else len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = index % len(self)
        at = at if self._indices is None else int(self._indices[at])
        part = bisect_right(self._starts, at) - 1
        return self._parts[part].example(at - self._starts[part], self._files)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example."""
    if isinstance(examples, StoredExamples):
        return examples.lengths
    return [example.length for example in examples]
