"""Rows of several sources -> examples, by all cores where there are many of them.

A file is read in chunks of whole lines (or of rows, where it has no lines). Each chunk becomes examples by
itself, in this process or in a worker process. The results are taken in the order of the data, so they do not
depend on the number of processes. Only a few chunks and the packed examples are held.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any

from talik.data.batches import question_draw
from talik.data.formats import Converter, RowOptions, converter_of, other_format
from talik.data.json_rows import row_of_line
from talik.data.labels import Labeller
from talik.data.media import MEDIA
from talik.data.messages import Conversation, Document
from talik.data.reading import kind_of, rows_of
from talik.data.report import LabelOptions, Report
from talik.data.rows import SHOWN, Place, Problem, Row, RowError
from talik.data.store import Part, packed
from talik.data.streams import LONGEST_ROW, DataFile, TextStream
from talik.data.template import template_of
from talik.errors import TalikError
from talik.files import fingerprint

CHUNK_BYTES = 512 << 10
CHUNK_ROWS = 500
PEEKED = 100  # rows by which a file's format is recognised


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """How examples are made of rows."""

    label: LabelOptions
    drop_media: bool
    keep_rejected: bool
    seed: int


@dataclass(frozen=True, slots=True)
class FileOptions:
    """A file, the number of it, its format and the options of its source."""

    file: DataFile
    number: int
    form: str
    rows: RowOptions
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of a file: whole lines with the number of the first, or rows."""

    of: FileOptions
    lines: bytes | None
    first: int
    rows: Sequence[Row | Problem] = ()


@dataclass(slots=True)
class Outcome:
    """Results of some chunks; they can be added up."""

    parts: list[Part] = field(default_factory=list)
    report: Report | None = None
    problems: list[Problem] = field(default_factory=list)  # the first of each kind and in all
    kinds: Counter[str] = field(default_factory=Counter)
    over: list[tuple[Place, str]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    media: int = 0
    formats: dict[tuple[str, str], Place] = field(default_factory=dict)  # the first of each file and format
    rows: int = 0

    def add(self, other: Outcome) -> None:
        """Adds the results of later rows."""
        self.parts += other.parts
        if self.report is None:
            self.report = other.report
        elif other.report is not None:
            self.report.merge(other.report)
        self.problems = (self.problems + other.problems)[:SHOWN]
        self.kinds += other.kinds
        self.over = (self.over + other.over)[:SHOWN]
        self.rejected += other.rejected
        self.unread += other.unread
        self.media += other.media
        self.formats = {**other.formats, **self.formats}
        self.rows += other.rows


class Preparer:
    """Makes examples of chunks, with one tokenizer."""

    def __init__(self, tokenizer: Any, options: PrepareOptions) -> None:
        self._labeller = Labeller(template_of(tokenizer), options.label)
        self._options = options

    def prepare(self, chunk: Chunk) -> Outcome:
        """The examples of a chunk, and the problems of its rows."""
        done = Outcome()
        converter = _converter(chunk.of)
        made: list[Conversation | Document] = []
        rows: dict[Place, Row] = {}
        for row in _rows(chunk):
            done.rows += 1
            if isinstance(row, Problem):
                self._reject(row, None, done)
                continue
            if (other := other_format(row, converter)) is not None:
                done.formats.setdefault((row.place.file, other), row.place)
                continue
            done.formats.setdefault((row.place.file, converter.name), row.place)
            rows[row.place] = row
            try:
                made.append(converter.convert(row))
            except RowError as error:
                self._reject(error.at(row.place), row, done)
        labelled = self._labeller.label(made)
        for problem in labelled.problems:
            self._reject(problem, rows.get(problem.place), done)
        draws = {row.place: question_draw(row, self._options.seed) for row in made}
        examples = labelled.examples
        questions = [draws[example.place] for example in examples]
        own = [_row_draw(chunk.of, example.place.line, self._options.seed) for example in examples]
        done.parts = [packed(examples, chunk.of.number, questions, own)]
        done.report, done.over = labelled.report, labelled.over[:SHOWN]
        done.unread = converter.unread
        return done

    def _reject(self, problem: Problem, row: Row | None, done: Outcome) -> None:
        if problem.kind == MEDIA and self._options.drop_media:
            done.media += 1
            return
        done.kinds[problem.kind] += 1
        if len(done.problems) < SHOWN:
            done.problems.append(problem)
        if self._options.keep_rejected:
            done.rejected.append({**as_dict(problem), "row": row.fields if row else None})


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


def _row_draw(of: FileOptions, line: int, seed: int) -> float:
    return int(fingerprint(str(seed), "row", str(of.number), str(line))[:13], 16) * 2.0**-52


def _rows(chunk: Chunk) -> Iterator[Row | Problem]:
    """The rows of a chunk, at most up to the limit of its source."""
    if chunk.lines is None:
        yield from chunk.rows
        return
    text = TextStream(chunk.of.file).decoded(chunk.lines, chunk.first)
    for number, line in enumerate(text.split("\n"), start=chunk.first):
        if len(line) >= LONGEST_ROW:
            place = Place(chunk.of.file.name, number)
            yield Problem(place, "row too large", f"the row has more than {LONGEST_ROW >> 20} MiB")
        elif line.strip():
            yield row_of_line(Place(chunk.of.file.name, number), line)


def file_options(file: DataFile, number: int, options: RowOptions, limit: int | None) -> FileOptions:
    """A file with its format, recognised from its first rows.

    Raises:
        DataError: The file cannot be read, or no format has its fields.
    """
    first = [row for row in islice(rows_of(file), PEEKED) if isinstance(row, Row)]
    form = converter_of(first, options).name if first or options.format else "messages"
    return FileOptions(file, number, form, options, limit)


def chunks(of: FileOptions) -> Iterator[Chunk]:
    """The chunks of a file, the same ones each time."""
    if of.limit is None and kind_of(of.file) == "jsonl":
        for first, block in TextStream(of.file).blocks(CHUNK_BYTES):
            yield Chunk(of, block, first)
        return
    rows = islice(rows_of(of.file), of.limit)
    while held := list(islice(rows, CHUNK_ROWS)):
        yield Chunk(of, None, held[0].place.line, held)


# All cores

_worker: Preparer | None = None  # of a worker process


def _start_worker(load: Callable[[], Any], options: PrepareOptions) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Preparer(load(), options)


def _end_with_parent() -> None:
    """Ends this worker when its parent has been killed: the other workers keep the queue open."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _in_worker(chunk: Chunk) -> Outcome:
    assert _worker is not None
    return _worker.prepare(chunk)


def prepare_all(
    work: Iterator[Chunk],
    tokenizer: Any,
    options: PrepareOptions,
    load: Callable[[], Any] | None,
    workers: int,
) -> Iterator[tuple[Chunk, Outcome]]:
    """Each chunk and its outcome, in order.

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
        return
    start = partial(_start_worker, load, options)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start)
    try:
        yield from _in_order(work, pool, 2 * workers)
    except BrokenProcessPool:
        problem = "A process that prepared rows has died, for lack of memory as a rule."
        raise TalikError(problem, remedy="Run it again: what is prepared is kept.") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    work: Iterator[Chunk], pool: ProcessPoolExecutor, ahead: int
) -> Iterator[tuple[Chunk, Outcome]]:
    """Hands chunks to the workers, at most `ahead` of them at once."""
    waiting: deque[tuple[Chunk, Future[Outcome]]] = deque()
    for chunk in work:
        waiting.append((replace(chunk, lines=b"", rows=()), pool.submit(_in_worker, chunk)))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def cores() -> int:
    """How many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
