"""Examples: token ids with the mask of the trained ones."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from talik.data.reading.rows import Place

IGNORED = -100  # the label that the losses of Transformers ignore


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens `start:stop` of an example, all trained or all masked."""

    start: int
    stop: int
    trained: bool


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids (32-bit), and the spans that cover them without gaps, trained and masked alternately."""

    input_ids: array[int]
    spans: tuple[Span, ...]
    place: Place

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """The number of tokens in the loss; the first token is never trained, because nothing predicts it."""
        return sum(span.stop - span.start for span in self.spans if span.trained)

    @property
    def labels(self) -> list[int]:
        """The label of each token at its own position (the loss shifts): its id, or -100 if it is masked."""
        labels = [IGNORED] * self.length
        for span in self.spans:
            if span.trained:
                labels[span.start : span.stop] = self.input_ids[span.start : span.stop]
        return labels


def spans_of(mask: bytearray) -> tuple[Span, ...]:
    """Returns the spans of a mask with one byte for each token: 1 if it is trained, else 0."""
    spans: list[Span] = []
    at = 0
    while at < len(mask):
        stop = mask.find(1 - mask[at], at)
        spans.append(Span(at, stop if stop > 0 else len(mask), mask[at] == 1))
        at = spans[-1].stop
    return tuple(spans)


def cut(example: Example, length: int) -> Example:
    """Returns the first `length` tokens of an example."""
    spans = (Span(s.start, min(s.stop, length), s.trained) for s in example.spans if s.start < length)
    return Example(example.input_ids[:length], tuple(spans), example.place)
