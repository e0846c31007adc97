"""Parses the field `thaw` of a recipe: "top.5,norm", "layers.20-27,head", "all"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from talik.base.errors import UsageError

FORMS = "all, layers.20-27, layers.3, top.5, norm, head or embeddings"
PARTS = ("norm", "head", "embeddings")
EVERY_PART = frozenset({*PARTS, "other"})  # "other" has no term of its own: only "all" includes it
_TERM = re.compile(r"all|norm|head|embeddings|layers\.(?P<first>\d+)(-(?P<last>\d+))?|top\.(?P<top>[1-9]\d*)")


@dataclass(frozen=True, slots=True)
class Thawed:
    """The trained parts of a model. `str` gives the line that `parse_thaw` reads back.

    Attributes:
        layers: Indices of the trained layers, ascending.
        parts: Other trained parts by the names of `Parts.part`: "embeddings", "norm", "head", "other".
        count: The number of layers of the model.
    """

    count: int
    layers: tuple[int, ...]
    parts: frozenset[str]

    @property
    def cut(self) -> int:
        """The first layer that a gradient reaches; `count` if there is none."""
        return 0 if self.parts & {"embeddings", "other"} else min(self.layers, default=self.count)

    @property
    def unties(self) -> bool:
        """True if the head shares its matrix with the embeddings and gets its own matrix to be trained."""
        return "head" in self.parts and "embeddings" not in self.parts

    def __str__(self) -> str:
        kept = len(self.layers)
        if kept == self.count and self.parts == EVERY_PART:
            return "all"
        if kept and self.layers == tuple(range(self.count - kept, self.count)):
            layers = [f"top.{kept}"]
        else:
            layers = [f"layers.{a}" if a == b else f"layers.{a}-{b}" for a, b in _ranges(self.layers)]
        return ",".join([*layers, *(part for part in PARTS if part in self.parts)])


def layers_in_words(layers: Iterable[int]) -> list[str]:
    """Ascending numbers as ["layers 2 to 4", "layer 7"]."""
    return [f"layer {a}" if a == b else f"layers {a} to {b}" for a, b in _ranges(layers)]


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The first and last number of each range: (2, 3, 4, 7) becomes (2, 4), (7, 7)."""
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    found = [[number for _, number in run] for _, run in runs]
    return [(run[0], run[-1]) for run in found]


def check_thaw(line: str) -> None:
    """Raises UsageError if a line is not written in one of FORMS."""
    for _ in _terms(line):
        pass


def parse_thaw(line: str, count: int) -> Thawed:
    """Parses a line for a model with `count` layers.

    Raises:
        UsageError: The line is not written as described, or names layers that the model does not have.
    """
    layers: set[int] = set()
    parts: set[str] = set()
    for term, found in _terms(line):
        if term == "all":
            layers |= set(range(count))
            parts |= EVERY_PART
        elif term in PARTS:
            parts.add(term)
        elif top := int(found["top"] or 0):
            _within(term, top, count)
            layers |= set(range(count - top, count))
        else:
            first = int(found["first"])
            last = int(found["last"] or first)
            _within(term, last + 1, count)
            layers |= set(range(first, last + 1))
    return Thawed(count, tuple(sorted(layers)), frozenset(parts))


def _terms(line: str) -> Iterator[tuple[str, re.Match[str]]]:
    for term in (part.strip() for part in line.split(",")):
        found = _TERM.fullmatch(term)
        if not found or (found["last"] and int(found["last"]) < int(found["first"])):
            raise UsageError(
                f"thaw: {term!r} is not one of {FORMS}", remedy="Write one or several with commas between."
            )
        yield term, found


def _within(term: str, needed: int, count: int) -> None:
    if needed > count:
        raise UsageError(
            f"thaw: {term} needs {needed} layers, and the model has {count} layers",
            remedy=f"Its layers are 0 to {count - 1}, the most is top.{count}.",
        )
