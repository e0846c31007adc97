"""Conversations -> examples: token ids and their masks, from one tokenisation of the whole text.

A token is trained if and only if it covers a character of a trained answer or of the end-of-turn after it.
Masks come from character ranges, never from token ids: a pad token that also ends a turn is trained there.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from talik.data.messages import Conversation
from talik.data.rows import SHOWN, Place, refuse
from talik.data.template import Answer, Rendered, Template, render, template_of
from talik.errors import DataError, UsageError

TrainOn = Literal["assistant", "last", "all"]
TooLong = Literal["drop", "cut", "refuse"]
KINDS = ("prompt cut", "answer cut", "end lost")
IGNORED = -100  # the label that losses of Transformers leave out
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start:stop` of an example, all trained or all masked."""

    start: int
    stop: int
    trained: bool


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids (32-bit) and the spans that cover them without gaps, trained and masked in turn."""

    input_ids: array[int]
    spans: tuple[Span, ...]
    place: Place

    @property
    def length(self) -> int:
        """How many tokens."""
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss counts; never the first one, which nothing predicts."""
        return sum(span.stop - span.start for span in self.spans if span.trained)

    @property
    def labels(self) -> list[int]:
        """The token id where trained, -100 where masked, in the token's own position: the loss shifts."""
        labels = [IGNORED] * self.length
        for span in self.spans:
            if span.trained:
                labels[span.start : span.stop] = self.input_ids[span.start : span.stop]
        return labels


@dataclass(slots=True)
class Counted:
    """How many, and the places of the first ten."""

    count: int = 0
    places: list[Place] = field(default_factory=list)

    def add(self, place: Place) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.places) < SHOWN:
            self.places.append(place)


@dataclass(slots=True)
class Report:
    """What became of the rows. `longest` is counted before anything is cut, the tokens after."""

    rows: int
    template: str
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    too_long: dict[str, Counted] = field(default_factory=lambda: {kind: Counted() for kind in KINDS})
    dropped: int = 0
    cut: int = 0
    tails_cut: int = 0  # over the length only by masked tokens after the last trained one: nothing is lost
    ends_added: int = 0  # the template has no end-of-turn, so the end token was added
    boundary_merged: int = 0  # a token covers characters of the prompt and of the answer


@dataclass(frozen=True, slots=True)
class _Made:
    example: Example
    content_stop: int  # the first token after the last trained answer's own text
    ended: bool
    merged: bool


def make_examples(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    *,
    train_on: TrainOn = "assistant",
    max_length: int = 2048,
    too_long: TooLong = "drop",
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Example], Report]:
    """One example a conversation, in order, and what was counted on the way.

    `train_on`: every answer, only the last one, or all tokens but the first. `too_long`: leave out, cut at
    `max_length` (an example with nothing left to train is left out) or refuse. `progress` is told how many
    conversations are done. `tokenizer` is a fast tokenizer of Transformers. Raises DataError with the places.
    """
    if max_length < 2:
        raise UsageError(f"max_length is {max_length}; it must be at least 2")
    template = template_of(tokenizer)
    _refuse_control_tokens(conversations, template)
    report = Report(len(conversations), template.name)
    examples: list[Example] = []
    over: list[tuple[Place, str]] = []
    for made in _make_all(conversations, template, train_on, progress):
        _count(report, made)
        kind = _too_long(made, max_length)
        if kind is not None:
            over.append((made.example.place, f"{made.example.length:,} tokens, at {max_length:,}: {kind}"))
        example = _fit(made.example, kind, max_length, too_long, report)
        if example is not None:
            examples.append(example)
    _refuse_too_long(over, examples, report, max_length, too_long)
    report.examples = len(examples)
    report.tokens = sum(example.length for example in examples)
    report.trained_tokens = sum(example.trained_tokens for example in examples)
    return examples, report


def _refuse_control_tokens(conversations: Sequence[Conversation], template: Template) -> None:
    problems = []
    for conversation in conversations:
        for number, message in enumerate(conversation.messages, start=1):
            found = template.control.search(message.content)
            if found:
                problem = f"message {number} ({message.role}) holds the control token {found[0]!r}"
                problems.append((conversation.place, f"{problem} at character {found.start() + 1:,}"))
                break
    if problems:
        refuse(problems, "Only the chat template may write control tokens: take them out of the text.")


def _make_all(
    conversations: Sequence[Conversation],
    template: Template,
    train_on: TrainOn,
    progress: Callable[[int], None] | None,
) -> Iterator[_Made]:
    problems: list[tuple[Place, str]] = []
    for at in range(0, len(conversations), CHUNK):
        chunk = conversations[at : at + CHUNK]
        rendered = render(chunk, template)
        problems += [(c.place, r) for c, r in zip(chunk, rendered, strict=True) if isinstance(r, str)]
        sound = [(c.place, r) for c, r in zip(chunk, rendered, strict=True) if isinstance(r, Rendered)]
        for (place, whole), encoding in zip(sound, _tokenise(sound, template), strict=True):
            made = _make(place, whole, encoding, train_on, template)
            if made.example.trained_tokens:
                yield made
            else:
                problems.append((place, "the answer has no tokens, so there is nothing to train"))
        if progress is not None:
            progress(at + len(chunk))
    if problems:
        refuse(problems, "Correct these rows or take them out of the file.")


def _tokenise(sound: Sequence[tuple[Place, Rendered]], template: Template) -> Sequence[Any]:
    texts = [rendered.text for _, rendered in sound]
    return template.backend.encode_batch(texts, add_special_tokens=False)  # the template has written them


def _make(place: Place, whole: Rendered, encoding: Any, train_on: TrainOn, template: Template) -> _Made:
    ids, offsets = array("i", encoding.ids), encoding.offsets
    answers = whole.answers[-1:] if train_on == "last" else whole.answers
    last = answers[-1]
    if train_on == "all":
        answers = (Answer(0, last.content_stop, len(whole.text)),)
    mask = bytearray(len(ids))
    merged = False
    for answer in answers:
        start, stop, straddled = _token_range(offsets, answer.start, answer.stop)
        mask[start:stop] = b"\1" * (stop - start)
        merged = merged or straddled
    content_stop = bisect_left(offsets, last.content_stop, key=lambda token: token[0])
    if not whole.ended:
        ids.append(_end_token(template.tokenizer))
        mask.append(1)
    mask[:1] = b"\0"
    return _Made(Example(ids, _spans(mask), place), content_stop, whole.ended, merged)


def _token_range(offsets: list[tuple[int, int]], start: int, stop: int) -> tuple[int, int, bool]:
    """The tokens that cover a character of `start:stop`, and whether one covers a character around it too."""
    first = bisect_right(offsets, start, key=lambda token: token[1])
    last = bisect_left(offsets, stop, key=lambda token: token[0])
    if first >= last:
        return first, first, False
    return first, last, offsets[first][0] < start or offsets[last - 1][1] > stop


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the chat template writes no end-of-turn token and the tokenizer has no end token (eos_token)",
            remedy="Set eos_token in tokenizer_config.json: without it the model never stops.",
        )
    return tokenizer.eos_token_id


def _spans(mask: bytearray) -> tuple[Span, ...]:
    spans, at = [], 0
    while at < len(mask):
        stop = mask.find(1 - mask[at], at)
        spans.append(Span(at, stop if stop > 0 else len(mask), mask[at] == 1))
        at = spans[-1].stop
    return tuple(spans)


def _count(report: Report, made: _Made) -> None:
    report.longest = max(report.longest, made.example.length)
    report.ends_added += not made.ended
    report.boundary_merged += made.merged


def _too_long(made: _Made, max_length: int) -> str | None:
    """What a cut at `max_length` would lose, or None if nothing that is trained."""
    trained = [span for span in made.example.spans if span.trained]
    if trained[-1].stop <= max_length:
        return None
    if trained[0].start >= max_length:
        return "prompt cut"
    return "end lost" if made.content_stop <= max_length else "answer cut"


def _fit(
    example: Example, kind: str | None, max_length: int, too_long: TooLong, report: Report
) -> Example | None:
    if example.length <= max_length:
        return example
    if kind is None:
        report.tails_cut += 1
        return _cut(example, max_length)
    report.too_long[kind].add(example.place)
    if too_long == "cut" and kind != "prompt cut":
        report.cut += 1
        return _cut(example, max_length)
    report.dropped += 1
    return None


def _cut(example: Example, length: int) -> Example:
    spans = (Span(s.start, min(s.stop, length), s.trained) for s in example.spans if s.start < length)
    return Example(example.input_ids[:length], tuple(spans), example.place)


def _refuse_too_long(
    over: list[tuple[Place, str]], examples: list[Example], report: Report, max_length: int, too_long: TooLong
) -> None:
    if over and too_long == "refuse":
        refuse(
            over, f"Raise max_length to {report.longest:,}, or let long rows be dropped or cut (too_long)."
        )
    if over and not examples:
        raise DataError(
            f"no row fits into max_length ({max_length:,} tokens): nothing is left to train",
            where=over[0][0],
            remedy=f"Raise max_length; the longest row has {report.longest:,} tokens.",
        )
