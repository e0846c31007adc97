"""Makes examples of conversations and documents: token ids and their masks.

The whole text of an example is tokenised once. A token is trained if and only if it covers a character of a
trained answer or of its end of turn. Masks are made from character ranges, not from token ids: a pad token
that also ends a turn is trained where it does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from talik.base.errors import DataError, UsageError
from talik.data.examples import Example, Span, cut, spans_of
from talik.data.messages import Conversation, Document
from talik.data.reading.rows import Place, Problem, RowError, refuse
from talik.data.report import LabelOptions, Report, TooLong
from talik.data.templates.control_tokens import check_control_tokens, control_tokens, quote, unquoted
from talik.data.templates.documents import document_ids
from talik.data.templates.encoding import Encoded, Text
from talik.data.templates.template import Template, template_of
from talik.data.templates.template_facts import facts_of
from talik.data.templates.turns import NOTHING_TO_TRAIN, Answer, Rendered, known_roles, render

CHUNK = 512


@dataclass(slots=True)
class Labelled:
    """The examples of some rows.

    Attributes:
        examples: The examples.
        report: The counts of rows, examples and tokens.
        problems: The problems of the rows without examples.
        too_long: The places of the examples that are too long, each with its lengths in words.
    """

    examples: list[Example]
    report: Report
    problems: list[Problem] = field(default_factory=list[Problem])
    too_long: list[tuple[Place, str]] = field(default_factory=list[tuple[Place, str]])


@dataclass(frozen=True, slots=True)
class _MaskedExample:
    """An example before it is cut.

    Attributes:
        example: The example.
        content_stop: The index of the first token after the content of the last trained answer.
        merged: True if a token covers characters of both the prompt and an answer.
    """

    example: Example
    content_stop: int
    merged: bool


class Labeller:
    """Makes examples with a tokenizer's chat template, whose facts are found once."""

    def __init__(self, template: Template, options: LabelOptions) -> None:
        if options.max_length < 2:
            raise UsageError(f"max_length is {options.max_length}; it must be at least 2")
        self.template, self.options = template, options
        self.facts = facts_of(template)
        self._control = control_tokens(template, self.facts)

    def label(self, rows: Sequence[Conversation | Document]) -> Labelled:
        """Makes one or several examples of each row, in order; a row without examples becomes a `Problem`."""
        done = Labelled([], Report(len(rows), self.template.name, self.facts))
        rendered: list[tuple[Place, Rendered, Text]] = []  # conversations that are encoded together
        for row in rows:
            try:
                if isinstance(row, Document):
                    self._encode(rendered, done)
                    rendered = []
                    self._add_document(row, done)
                else:
                    rendered += self._rendered(row, done.report)
            except RowError as error:
                done.problems.append(error.at(row.place))
        self._encode(rendered, done)
        done.report.examples = len(done.examples)
        done.report.tokens = sum(example.length for example in done.examples)
        done.report.trained_tokens = sum(example.trained_tokens for example in done.examples)
        return done

    def _rendered(self, row: Conversation, report: Report) -> list[tuple[Place, Rendered, Text]]:
        """Renders the examples of a conversation, and counts what the template does with it."""
        if self.options.control_tokens == "refuse":
            check_control_tokens(row, self._control)
        elif self.options.control_tokens == "escape":
            row = quote(row, self._control)
        found = [unquoted(r) for r in render(row, self.template, self.facts, self.options.train_on)]
        report.developers += known_roles(row.messages, self.facts)[0].role != row.messages[0].role
        report.split_turns += len(found) > 1
        report.quoted += sum(bool(quotes) for _, quotes in found)
        report.ends_added += sum(bool(rendered.added_ends) for rendered, _ in found)
        report.thoughts += sum(rendered.thoughts for rendered, _ in found)
        return [(row.place, r, Text(r.text, _boundaries(r), quotes)) for r, quotes in found]

    def _encode(self, ready: list[tuple[Place, Rendered, Text]], done: Labelled) -> None:
        """Tokenises rendered examples and adds them with their masks."""
        encoded = self.template.encoder.encode([text for _, _, text in ready])
        for (place, rendered, _), tokens in zip(ready, encoded, strict=True):
            if isinstance(tokens, RowError):
                done.problems.append(tokens.at(place))
                continue
            made = self._masked(place, rendered, tokens)
            if made.example.trained_tokens:
                self._add(made, done)
            else:
                problem = "the answer has no tokens, so there is nothing to train"
                done.problems.append(Problem(place, NOTHING_TO_TRAIN, problem))

    def _masked(self, place: Place, rendered: Rendered, tokens: Encoded) -> _MaskedExample:
        """Masks all tokens except those of the trained answers."""
        mask = bytearray(len(tokens.ids))
        merged = False
        last = rendered.answers[-1]
        for answer in self._trained(rendered):
            begin = answer.start if self.options.train_reasoning else answer.reasoning_stop
            start, stop, crosses = _token_range(tokens.offsets, begin, answer.stop)
            mask[start:stop] = b"\1" * (stop - start)
            merged = merged or crosses
        mask[:1] = b"\0"  # nothing predicts the first token
        content_stop = bisect_left(tokens.offsets, last.content_stop, key=lambda token: token[0])
        return _MaskedExample(Example(tokens.ids, spans_of(mask), place), content_stop, merged)

    def _trained(self, rendered: Rendered) -> Sequence[Answer]:
        """Returns the trained ranges; with `train_on` "all" the whole text that is new in this example."""
        if self.options.train_on != "all":
            return rendered.answers
        last = rendered.answers[-1]
        return (Answer(rendered.new, last.content_stop, len(rendered.text), rendered.new),)

    def _add(self, made: _MaskedExample, done: Labelled) -> None:
        """Adds an example; one over the greatest length is cut or dropped, as the options say."""
        limit, report = self.options.max_length, done.report
        report.longest = max(report.longest, made.example.length)
        report.boundary_merged += made.merged
        kind = _cut_kind(made, limit)
        if kind is not None:
            done.too_long.append(
                (made.example.place, f"{made.example.length:,} tokens, at {limit:,}: {kind}")
            )
        example = _shortened(made.example, kind, limit, self.options.too_long, report)
        if example is not None:
            done.examples.append(example)

    def _add_document(self, document: Document, done: Labelled) -> None:
        """Adds a document as consecutive examples of at most the greatest length."""
        if self.options.control_tokens == "refuse":
            check_control_tokens(document, self._control)
        quoted = self.options.control_tokens == "escape"
        ids = document_ids(document, self.template, self._control if quoted else None)
        limit, report = self.options.max_length, done.report
        report.documents += 1
        report.longest = max(report.longest, len(ids))
        for start in range(0, len(ids), limit):
            piece = ids[start : start + limit]
            if len(piece) > 1:  # a single token predicts nothing
                spans = (Span(0, 1, False), Span(1, len(piece), True))
                done.examples.append(Example(piece, spans, document.place))
                report.pieces += 1


def make_examples(
    conversations: Sequence[Conversation | Document],
    tokenizer: Any,
    *,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> tuple[list[Example], Report]:
    """Makes the examples of all rows, in order.

    Args:
        conversations: Conversations and documents.
        tokenizer: A tokenizer of Transformers.
        progress: Gets the number of rows that are done.
        options: The fields of LabelOptions.

    Returns:
        The examples, and the counts of rows, examples and tokens.

    Raises:
        DataError: Rows cannot be used; the error has their places.
    """
    labeller = Labeller(template_of(tokenizer), LabelOptions(**options))
    whole = Labelled([], Report(0, labeller.template.name, labeller.facts))
    for done in _chunks(conversations, labeller, progress):
        whole.examples += done.examples
        whole.report.merge(done.report)
        whole.problems += done.problems
        whole.too_long += done.too_long
    if whole.problems:
        found = [(problem.place, problem.text) for problem in whole.problems]
        refuse(found, "Correct these rows or remove them from the file.")
    refuse_too_long(whole.too_long, len(whole.examples), whole.report, labeller.options)
    return whole.examples, whole.report


def _chunks(
    rows: Sequence[Conversation | Document], labeller: Labeller, progress: Callable[[int], None] | None
) -> Iterator[Labelled]:
    for at in range(0, len(rows), CHUNK):
        chunk = rows[at : at + CHUNK]
        yield labeller.label(chunk)
        if progress is not None:
            progress(at + len(chunk))


def _boundaries(rendered: Rendered) -> list[int]:
    """Returns the characters at which masks may begin or end."""
    return [at for a in rendered.answers for at in (a.start, a.reasoning_stop, a.content_stop, a.stop)]


def _token_range(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int, bool]:
    """Finds the tokens that cover a character of `start:stop`.

    Returns:
        The index of the first token, the index after the last one, and True if one of them also covers a
        character outside the range.
    """
    first = bisect_right(offsets, start, key=lambda token: token[1])
    last = bisect_left(offsets, stop, key=lambda token: token[0])
    if first >= last:
        return first, first, False
    return first, last, offsets[first][0] < start or offsets[last - 1][1] > stop


def _cut_kind(made: _MaskedExample, max_length: int) -> str | None:
    """Returns the loss of a cut at `max_length`, one of CUT_KINDS; None if no trained token would be lost."""
    trained = [span for span in made.example.spans if span.trained]
    if trained[-1].stop <= max_length:
        return None
    if trained[0].start >= max_length:
        return "prompt cut"
    return "end lost" if made.content_stop <= max_length else "answer cut"


def _shortened(
    example: Example, kind: str | None, max_length: int, too_long: TooLong, report: Report
) -> Example | None:
    """Returns an example with at most `max_length` tokens, or None if it is dropped; counts both."""
    if example.length <= max_length:
        return example
    if kind is None:
        report.tails_cut += 1
        return cut(example, max_length)
    report.too_long[kind].add(example.place)
    if too_long == "cut" and kind != "prompt cut":
        report.cut += 1
        return cut(example, max_length)
    report.dropped += 1
    return None


def refuse_too_long(
    too_long: Sequence[tuple[Place, str]], examples: int, report: Report, options: LabelOptions
) -> None:
    """Refuses examples over the greatest length if the options say so, or if no other example is left.

    Args:
        too_long: The places of the examples that are too long, each with its lengths in words.
        examples: The number of examples that are left.
        report: The counts.
        options: The options.

    Raises:
        DataError: The examples are refused.
    """
    if too_long and options.too_long == "refuse":
        remedy = f"Raise max_length to {report.longest:,}, or let long rows be dropped or cut (too_long)."
        refuse(too_long, remedy)
    if too_long and not examples:
        raise DataError(
            f"no row fits into max_length ({options.max_length:,} tokens): nothing is left to train",
            where=too_long[0][0],
            remedy=f"Raise max_length; the longest row has {report.longest:,} tokens.",
        )
