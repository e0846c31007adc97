"""Makes examples of the rows of several files, with all cores if there are many rows.

A file is read in chunks of whole lines (or of rows, if it has no lines). Each chunk becomes examples on its
own, in this process or in a worker process. The results are taken in the order of the data, so they do not
depend on the number of processes. Only a few chunks and the packed examples are in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from talik.data.examples import Example
from talik.data.formats.formats import RowOptions, converter_named
from talik.data.labels import Labeller
from talik.data.messages import Conversation, Document
from talik.data.preparing.held_out import question_draw, row_draw
from talik.data.preparing.parts import Part, packed
from talik.data.preparing.workers import in_order
from talik.data.reading.file_rows import kind_of, rows_of
from talik.data.reading.json_rows import row_of_line
from talik.data.reading.rows import SHOWN, Place, Problem, Row, RowError, too_large
from talik.data.reading.streams import LONGEST_ROW, DataFile, TextStream
from talik.data.report import LabelOptions, Report
from talik.data.templates.template import template_of

CHUNK_BYTES = 512 << 10
CHUNK_ROWS = 500
_MOST_NAMES = 1000  # unused fields that are counted by name


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """The options that examples depend on."""

    label: LabelOptions
    seed: int


@dataclass(frozen=True, slots=True)
class InputFile:
    """A data file with its format and the options of its source.

    Attributes:
        file: The file.
        number: The index of the file among all files.
        source: The index of its source.
        format: The name of its format.
        options: The options for reading its rows.
        limit: The greatest number of rows to read; None: all.
    """

    file: DataFile
    number: int
    source: int
    format: str
    options: RowOptions
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of a file: as whole lines, or as rows if the file has no lines.

    Attributes:
        input: The file.
        lines: The bytes of the lines; None: see `rows`.
        first: The number of the first line or of the first row; both start at 1.
        rows: The rows.
        size: The number of bytes of the lines; 0 if it is not known.
    """

    input: InputFile
    lines: bytes | None
    first: int
    rows: Sequence[Row | Problem] = ()
    size: int = 0

    def bare(self) -> Chunk:
        """Returns the chunk without its rows."""
        return replace(self, lines=None, rows=())


@dataclass(slots=True)
class Rejected:
    """Rows that cannot be used, as lines of JSON, in files and in memory; iterates over all lines."""

    lines: list[str] = field(default_factory=list[str])
    files: list[Path] = field(default_factory=list[Path])

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            with file.open(encoding="utf-8") as stream:
                yield from stream
        yield from self.lines


@dataclass(slots=True)
class Outcome:
    """The results of one or several chunks.

    Attributes:
        parts: The examples.
        report: The counts of examples and tokens.
        problems: The first problems of each kind.
        kinds: The number of problems of each kind.
        too_long: The places of the first examples that are too long, each with its lengths in words.
        rejected: The rows that cannot be used.
        unread: For each field that is not used, the number of rows that have it.
        rows: The number of rows.
    """

    parts: list[Part] = field(default_factory=list[Part])
    report: Report | None = None
    problems: list[Problem] = field(default_factory=list[Problem])
    kinds: Counter[str] = field(default_factory=Counter[str])
    too_long: list[tuple[Place, str]] = field(default_factory=list[tuple[Place, str]])
    rejected: Rejected = field(default_factory=Rejected)
    unread: Counter[str] = field(default_factory=Counter[str])
    rows: int = 0

    def add(self, other: Outcome) -> None:
        """Adds the results of later rows."""
        self.parts += other.parts
        if self.report is None:
            self.report = other.report
        elif other.report is not None:
            self.report.merge(other.report)
        listed = Counter(problem.kind for problem in self.problems)
        for problem in other.problems:
            listed[problem.kind] += 1
            if listed[problem.kind] <= SHOWN:
                self.problems.append(problem)
        self.kinds += other.kinds
        self.too_long = (self.too_long + other.too_long)[:SHOWN]
        self.rejected.lines += other.rejected.lines
        self.rejected.files += other.rejected.files
        self.unread = Counter(dict((self.unread + other.unread).most_common(_MOST_NAMES)))
        self.rows += other.rows


@dataclass(slots=True)
class _ConvertedChunk:
    """The rows of a chunk after conversion.

    Several rows may stand in one line, so a row is known by the identity of its place object, which its
    examples and problems share.
    """

    made: list[Conversation | Document] = field(default_factory=list[Conversation | Document])
    problems: list[tuple[Problem, Row | None]] = field(default_factory=list[tuple[Problem, Row | None]])
    rows: dict[int, Row] = field(default_factory=dict[int, Row])
    numbers: dict[int, int] = field(default_factory=dict[int, int])
    count: int = 0


class Preparer:
    """Makes examples of chunks with one tokenizer."""

    def __init__(self, tokenizer: Any, options: PrepareOptions) -> None:
        self._labeller = Labeller(template_of(tokenizer), options.label)
        self._seed = options.seed

    def prepare(self, chunk: Chunk) -> Outcome:
        """Makes the examples of a chunk and collects the problems of its rows."""
        converter = converter_named(chunk.input.format, chunk.input.options)
        converted = _ConvertedChunk()
        for number, row in _rows(chunk):
            converted.count += 1
            if isinstance(row, Problem):
                converted.problems.append((row, None))
                continue
            converted.rows[id(row.place)], converted.numbers[id(row.place)] = row, number
            try:
                converted.made.append(converter.convert(row))
            except RowError as error:
                converted.problems.append((error.at(row.place), row))
        outcome = self._label(converted, chunk.input.number)
        outcome.unread = converter.unread
        return outcome

    def _label(self, converted: _ConvertedChunk, file: int) -> Outcome:
        labelled = self._labeller.label(converted.made)
        outcome = Outcome(
            parts=[self._packed(labelled.examples, converted, file)],
            report=labelled.report,
            too_long=labelled.too_long[:SHOWN],
            rows=converted.count,
        )
        in_labels = [(problem, converted.rows.get(id(problem.place))) for problem in labelled.problems]
        _reject(converted.problems + in_labels, outcome)
        return outcome

    def _packed(self, examples: Sequence[Example], converted: _ConvertedChunk, file: int) -> Part:
        questions = {id(row.place): question_draw(row, self._seed) for row in converted.made}
        own = {place: row_draw(self._seed, file, number) for place, number in converted.numbers.items()}
        places = [id(example.place) for example in examples]
        return packed(examples, file, [questions[p] for p in places], [own[p] for p in places])


def _reject(problems: list[tuple[Problem, Row | None]], outcome: Outcome) -> None:
    """Counts the rows that cannot be used, and adds them as lines of JSON, in the order of the file."""
    for problem, row in sorted(problems, key=lambda item: item[0].place.line):
        outcome.kinds[problem.kind] += 1
        if outcome.kinds[problem.kind] <= SHOWN:
            outcome.problems.append(problem)
        line = {**as_dict(problem), "row": row.fields if row else None}
        outcome.rejected.lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def as_dict(problem: Problem) -> dict[str, Any]:
    """Returns a problem in a form for programs."""
    place = problem.place
    return {
        "file": place.file,
        place.unit: place.line,
        "field": problem.field,
        "kind": problem.kind,
        "problem": problem.text,
    }


def _rows(chunk: Chunk) -> Iterator[tuple[int, Row | Problem]]:
    """Yields the rows of a chunk, each with its line number, or its row number if the file has no lines."""
    if chunk.lines is None:
        yield from enumerate(chunk.rows, start=chunk.first)
        return
    text = TextStream(chunk.input.file).decoded(chunk.lines, chunk.first)
    for number, line in enumerate(text.split("\n"), start=chunk.first):
        place = Place(chunk.input.file.name, number)
        if len(line) >= LONGEST_ROW:
            yield number, too_large(place, LONGEST_ROW)
        elif line.strip():
            yield number, row_of_line(place, line)


def chunks(input_file: InputFile) -> Iterator[Chunk]:
    """Yields the chunks of a file up to its limit; the same chunks each time."""
    if input_file.limit is None and kind_of(input_file.file) == "jsonl":
        for first, block in TextStream(input_file.file).blocks(CHUNK_BYTES):
            yield Chunk(input_file, block, first, size=len(block))
        return
    rows, first = islice(rows_of(input_file.file), input_file.limit), 1
    while held := list(islice(rows, CHUNK_ROWS)):
        yield Chunk(input_file, None, first, held)
        first += len(held)


def chunks_of_all(files: Sequence[InputFile]) -> Iterator[Chunk]:
    """Yields the chunks of all files in order."""
    return (chunk for input_file in files for chunk in chunks(input_file))


def prepare_all(
    work: Iterator[Chunk],
    tokenizer: Any,
    options: PrepareOptions,
    load: Callable[[], Any] | None,
    workers: int,
) -> Iterator[tuple[Chunk, Outcome]]:
    """Prepares chunks and yields each one, possibly without its rows, with its outcome, in order.

    Args:
        work: The chunks.
        tokenizer: The tokenizer for this process.
        options: The options that examples depend on.
        load: Loads the tokenizer in a worker process; None: no worker processes.
        workers: The number of worker processes; below 2 this process prepares the chunks.

    Raises:
        TalikError: A worker process has died.
    """
    if load is None or workers < 2:
        preparer = Preparer(tokenizer, options)
        yield from ((chunk, preparer.prepare(chunk)) for chunk in work)
    else:
        yield from in_order(work, load, options, workers)
