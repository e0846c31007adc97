"""Rows of several sources -> examples, by all cores where there are many of them.

A file is read in chunks of whole lines (or of rows, where it has no lines). Each chunk becomes examples by
itself, in this process or in a worker process. The results are taken in the order of the data, so they do not
depend on the number of processes. Only a few chunks and the packed examples are held.
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
from talik.data.formats.formats import Converter, RowOptions, converter_of, other_format
from talik.data.labels import Labeller
from talik.data.messages import Conversation, Document
from talik.data.preparing.held_out import question_draw, row_draw
from talik.data.preparing.parts import Part, packed
from talik.data.preparing.workers import in_order
from talik.data.reading.file_rows import kind_of, rows_of
from talik.data.reading.json_rows import row_of_line
from talik.data.reading.rows import SHOWN, Place, Problem, Row, RowError
from talik.data.reading.streams import LONGEST_ROW, DataFile, TextStream
from talik.data.report import LabelOptions, Report
from talik.data.templates.template import template_of

CHUNK_BYTES = 512 << 10
CHUNK_ROWS = 500
PEEKED = 100  # rows by which a file's format is recognised
OTHER_FORMAT = "another format"
_NAMES = 1000  # fields that are not read and are counted by name


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """How examples are made of rows."""

    label: LabelOptions
    seed: int


@dataclass(frozen=True, slots=True)
class FileOptions:
    """A file, its number and that of its source, its format and the options of its source."""

    file: DataFile
    number: int
    source: int
    form: str
    rows: RowOptions
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of a file: as whole lines, or as rows where the file has none.

    Attributes:
        first: The number of the first line, or of the first row; both start at 1.
        size: Bytes of the lines; 0 where they are not known.
    """

    of: FileOptions
    lines: bytes | None
    first: int
    rows: Sequence[Row | Problem] = ()
    size: int = 0

    def bare(self) -> Chunk:
        """The chunk without its rows."""
        return replace(self, lines=None, rows=())


@dataclass(slots=True)
class Rejected:
    """Rows that cannot be used, as lines of JSON: some in memory, others in files."""

    lines: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            with file.open(encoding="utf-8") as stream:
                yield from stream
        yield from self.lines


@dataclass(slots=True)
class Outcome:
    """Results of some chunks; they can be added up.

    Attributes:
        problems: The first of each kind.
        kinds: How many there are of each kind.
        over: The first examples that are too long.
        unread: Fields that are not read, with their numbers of rows.
    """

    parts: list[Part] = field(default_factory=list)
    report: Report | None = None
    problems: list[Problem] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    over: list[tuple[Place, str]] = field(default_factory=list)
    rejected: Rejected = field(default_factory=Rejected)
    unread: Counter[str] = field(default_factory=Counter)
    rows: int = 0

    def add(self, other: Outcome) -> None:
        """Adds the results of later rows."""
        self.parts += other.parts
        if self.report is None:
            self.report = other.report
        elif other.report is not None:
            self.report.merge(other.report)
        known = Counter(problem.kind for problem in self.problems)
        for problem in other.problems:
            known[problem.kind] += 1
            if known[problem.kind] <= SHOWN:
                self.problems.append(problem)
        self.kinds += other.kinds
        self.over = (self.over + other.over)[:SHOWN]
        self.rejected.lines += other.rejected.lines
        self.rejected.files += other.rejected.files
        self.unread = Counter(dict((self.unread + other.unread).most_common(_NAMES)))
        self.rows += other.rows


class Preparer:
    """Makes examples of chunks, with one tokenizer."""

    def __init__(self, tokenizer: Any, options: PrepareOptions) -> None:
        self._labeller = Labeller(template_of(tokenizer), options.label)
        self._seed = options.seed

    def prepare(self, chunk: Chunk) -> Outcome:
        """The examples of a chunk, and the problems of its rows."""
        converter = _converter(chunk.of)
        # Several rows may stand in one line: a row is known by its place as an object, which examples share.
        rows: dict[int, Row] = {}
        numbers: dict[int, int] = {}
        made: list[Conversation | Document] = []
        problems: list[tuple[Problem, Row | None]] = []
        count = 0
        for number, row in _rows(chunk):
            count += 1
            if isinstance(row, Problem):
                problems.append((row, None))
                continue
            rows[id(row.place)], numbers[id(row.place)] = row, number
            try:
                made.append(_converted(row, converter))
            except RowError as error:
                problems.append((error.at(row.place), row))
        labelled = self._labeller.label(made)
        problems += [(problem, rows.get(id(problem.place))) for problem in labelled.problems]
        done = Outcome(report=labelled.report, over=labelled.over[:SHOWN], rows=count)
        done.unread = converter.unread
        done.parts = [self._packed(labelled.examples, made, numbers, chunk.of.number)]
        _reject(problems, done)
        return done

    def _packed(
        self,
        examples: Sequence[Example],
        made: Sequence[Conversation | Document],
        numbers: dict[int, int],
        file: int,
    ) -> Part:
        questions = {id(row.place): question_draw(row, self._seed) for row in made}
        own = {place: row_draw(self._seed, file, number) for place, number in numbers.items()}
        places = [id(example.place) for example in examples]
        return packed(examples, file, [questions[p] for p in places], [own[p] for p in places])


def _converted(row: Row, converter: Converter) -> Conversation | Document:
    if (other := other_format(row, converter)) is not None:
        raise RowError(OTHER_FORMAT, f"the row has the format '{other}', and its file '{converter.name}'")
    return converter.convert(row)


def _reject(problems: list[tuple[Problem, Row | None]], done: Outcome) -> None:
    """Counts rows that cannot be used, and keeps them as lines."""
    problems.sort(key=lambda item: item[0].place.line)
    for problem, row in problems:
        done.kinds[problem.kind] += 1
        if done.kinds[problem.kind] <= SHOWN:
            done.problems.append(problem)
        whole = {**as_dict(problem), "row": row.fields if row else None}
        done.rejected.lines.append(json.dumps(whole, ensure_ascii=False, default=str) + "\n")


def as_dict(problem: Problem) -> dict[str, Any]:
    """A problem for programs."""
    place = problem.place
    return {
        "file": place.file,
        place.unit: place.line,
        "field": problem.field,
        "kind": problem.kind,
        "problem": problem.text,
    }


def _converter(of: FileOptions) -> Converter:
    if of.form == "fields":
        return converter_of([], of.rows)
    return converter_of([], replace(of.rows, format=of.form, input_field=None, output_field=None))


def _rows(chunk: Chunk) -> Iterator[tuple[int, Row | Problem]]:
    """The rows of a chunk, each with its number: of the line, or of the row where the file has no lines."""
    if chunk.lines is None:
        yield from enumerate(chunk.rows, start=chunk.first)
        return
    text = TextStream(chunk.of.file).decoded(chunk.lines, chunk.first)
    for number, line in enumerate(text.split("\n"), start=chunk.first):
        place = Place(chunk.of.file.name, number)
        if len(line) >= LONGEST_ROW:
            yield number, Problem(place, "row too large", f"the row has more than {LONGEST_ROW >> 20} MiB")
        elif line.strip():
            yield number, row_of_line(place, line)


def file_options(
    file: DataFile, number: int, source: int, options: RowOptions, limit: int | None
) -> FileOptions:
    """A file with its format, recognised from its first rows.

    Raises:
        DataError: The file cannot be read, or no format has its fields.
    """
    first = [row for row in islice(rows_of(file), PEEKED) if isinstance(row, Row)]
    form = converter_of(first, options).name if first or options.format else "messages"
    return FileOptions(file, number, source, form, options, limit)


def chunks(of: FileOptions) -> Iterator[Chunk]:
    """The chunks of a file, the same ones each time; at most up to the limit of its source."""
    if of.limit is None and kind_of(of.file) == "jsonl":
        for first, block in TextStream(of.file).blocks(CHUNK_BYTES):
            yield Chunk(of, block, first, size=len(block))
        return
    rows, first = islice(rows_of(of.file), of.limit), 1
    while held := list(islice(rows, CHUNK_ROWS)):
        yield Chunk(of, None, first, held)
        first += len(held)


def prepare_all(
    work: Iterator[Chunk],
    tokenizer: Any,
    options: PrepareOptions,
    load: Callable[[], Any] | None,
    workers: int,
) -> Iterator[tuple[Chunk, Outcome]]:
    """Each chunk, perhaps without its rows, and its outcome, in order.

    Args:
        work: The chunks.
        tokenizer: For this process.
        options: How examples are made.
        load: Loads the tokenizer in a worker process; None: there are no workers.
        workers: How many processes.

    Raises:
        TalikError: A worker process has died.
    """
    if load is None or workers < 2:
        preparer = Preparer(tokenizer, options)
        yield from ((chunk, preparer.prepare(chunk)) for chunk in work)
    else:
        yield from in_order(work, load, options, workers)
