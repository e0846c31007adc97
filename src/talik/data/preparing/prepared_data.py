"""Prepares all examples of some sources, and refuses or counts the rows that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from talik.base.errors import DataError
from talik.base.events import Notify, Status
from talik.data.examples import Example
from talik.data.formats.file_format import file_converter, row_options
from talik.data.formats.formats import OTHER_FORMAT
from talik.data.formats.media import MEDIA
from talik.data.labels import refuse_too_long
from talik.data.preparing.cache import PreparationProgress, prepare_cached
from talik.data.preparing.parts import joined
from talik.data.preparing.prepare import (
    InputFile,
    Outcome,
    PrepareOptions,
    chunks,
    chunks_of_all,
    prepare_all,
)
from talik.data.preparing.stored_examples import StoredExamples
from talik.data.reading.file_rows import READING_PROBLEMS, remedy_for
from talik.data.reading.rows import SHOWN, Problem
from talik.data.reading.sources import INPUT, find_data
from talik.data.reading.streams import DataFile
from talik.data.report import LabelOptions, Report
from talik.recipe.data_source import DataSource
from talik.recipe.recipe import Recipe

LARGE = 32 << 20  # bytes of text from which data are prepared by all cores, in the cache
_COMPRESSION = 5  # bytes of text in a byte of a compressed file, approximately
_COMPRESSED = (".gz", ".zst", ".xz", ".parquet")
_SKIP = "--bad-rows skip leaves them out and counts them."
REMEDIES = {
    MEDIA: "--drop-media leaves rows with images, video or audio out.",
    "control token": "Only the chat template may write control tokens: remove them from the text, or train "
    "them as ordinary text with --control-tokens escape.",
    OTHER_FORMAT: f"Put the rows of each format into a file of its own; {_SKIP}",
}


@dataclass(frozen=True, slots=True)
class SourceCount:
    """The examples and tokens of a set that come from one source."""

    path: str
    examples: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class Data:
    """A set of examples, with the counts of the rows that they were made of.

    Attributes:
        path: The names of the sources, separated by commas.
        use: The use of the examples, such as "training".
        format: The names of the recognised formats, separated by commas.
        examples: The examples.
        report: The counts of rows, examples and tokens.
        sources: The examples and tokens of each source.
        problems: The number of rows that were left out, by kind of problem.
        rejected: These rows as lines of JSON, each with its place and the reason.
        unread: For each field that is not used, the number of rows that have it.
        media: The number of rows with images, video or audio that were left out.
        ranges: The name, first index and end index of the examples of each source, if the examples are in the
            order of the sources.
    """

    path: str
    use: str
    format: str
    examples: Sequence[Example]
    report: Report
    sources: tuple[SourceCount, ...] = ()
    problems: dict[str, int] = field(default_factory=dict[str, int])
    rejected: Iterable[str] = ()
    unread: dict[str, int] = field(default_factory=dict[str, int])
    media: int = 0
    ranges: tuple[tuple[str, int, int], ...] = ()


@dataclass(slots=True)
class PreparedData:
    """All examples of some sources, and the outcome of preparing their rows."""

    examples: StoredExamples
    outcome: Outcome
    files: list[InputFile]
    recipe: Recipe

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        sources: Sequence[DataSource],
        tokenizer: Any,
        load: Callable[[], Any] | None,
        notify: Notify,
    ) -> PreparedData:
        """Reads the sources and makes their examples.

        Args:
            recipe: The options.
            sources: The sources.
            tokenizer: A tokenizer of Transformers.
            load: Loads the tokenizer in another process; None: everything is done in this process.
            notify: Gets events about the progress.

        Raises:
            DataError: Rows cannot be used, and the recipe does not skip them; or no example is left.
        """
        files = _input_files(recipe, sources, notify)
        options = PrepareOptions(label_options(recipe), recipe.seed)
        size = sum(_text_size(each.file) for each in files)
        if size < LARGE or load is None or any(each.file.name == INPUT for each in files):
            outcome = _prepare_in_memory(files, tokenizer, options, size, notify)
        else:
            outcome = prepare_cached(files, tokenizer, options, load, size, notify)
        _check(outcome, recipe, files)
        places = [(each.file.name, _unit(each.file)) for each in files]
        return cls(StoredExamples(outcome.parts, places), outcome, files, recipe)

    def data(self, indices: Any, use: str, *, whole: bool = True) -> Data:
        """Returns a set of the examples.

        Args:
            indices: The indices of the examples, in order.
            use: The use of the set, such as "training".
            whole: True if the counts of rows that were left out belong to this set.
        """
        examples = self.examples.at(indices)
        sources = tuple(self._source_counts(examples))
        data = Data(
            path=", ".join(dict.fromkeys(each.file.origin for each in self.files)),
            use=use,
            format=", ".join(dict.fromkeys(each.format for each in self.files)),
            examples=examples,
            report=self._report(examples, whole),
            sources=sources,
            ranges=tuple(_ranges(sources)),
        )
        if not whole:
            return data
        bad, media = _left_out(self.outcome, self.recipe)
        return replace(
            data,
            problems=dict(bad),
            rejected=self.outcome.rejected if bad or media else (),
            unread=dict(self.outcome.unread),
            media=media,
        )

    def _report(self, examples: StoredExamples, whole: bool) -> Report:
        report = self.outcome.report
        assert report is not None
        own = report if whole else Report(0, report.template, report.facts, longest=report.longest)
        all_of_them = len(examples) == len(self.examples)
        return replace(
            own,
            rows=report.rows if all_of_them else len(np.unique(examples.column("row"))),
            examples=len(examples),
            tokens=int(examples.column("length").sum()),
            trained_tokens=int(examples.column("trained").sum()),
        )

    def _source_counts(self, examples: StoredExamples) -> Iterator[SourceCount]:
        """Yields the counts of each source, in order; sources with the same name are numbered."""
        names: Counter[str] = Counter()
        file, lengths = examples.column("file"), examples.column("length")
        trained = examples.column("trained")
        for source in dict.fromkeys(each.source for each in self.files):
            files = [each for each in self.files if each.source == source]
            mine = np.isin(file, [each.number for each in files])
            name = files[0].file.origin
            names[name] += 1
            name += f" ({names[name]})" if names[name] > 1 else ""
            yield SourceCount(name, int(mine.sum()), int(lengths[mine].sum()), int(trained[mine].sum()))


def _ranges(counts: Sequence[SourceCount]) -> Iterator[tuple[str, int, int]]:
    """Yields the name and the range of indices of each source with examples."""
    at = 0
    for count in counts:
        if count.examples:
            yield count.path, at, at + count.examples
            at += count.examples


def label_options(recipe: Recipe) -> LabelOptions:
    """Returns the options of a recipe for making examples."""
    return LabelOptions(
        recipe.train_on, recipe.max_length, recipe.too_long, recipe.control_tokens, recipe.train_reasoning
    )


def _unit(file: DataFile) -> str:
    """Returns the unit of places in a file."""
    return "row" if file.path.suffix in (".parquet", ".arrow") else "line"


def _text_size(file: DataFile) -> int:
    """Estimates the number of bytes of text in a file."""
    size = file.path.stat().st_size
    return size * _COMPRESSION if file.path.suffix.lower() in _COMPRESSED else size


def _input_files(recipe: Recipe, sources: Sequence[DataSource], notify: Notify) -> list[InputFile]:
    """Finds the files of all sources, up to their limits, and recognises the format of each."""
    found: list[InputFile] = []
    for number, source in enumerate(sources):
        options = row_options(source, recipe)
        left = source.limit
        files = find_data(source.path, lambda line: notify(Status("data", line)))
        for file in files:
            name = file_converter(file, options).name
            found.append(InputFile(file, len(found), number, name, options, left))
            if left is not None and file is not files[-1]:
                left -= sum(len(chunk.rows) for chunk in chunks(found[-1]))
                if left <= 0:
                    break
    return found


def _prepare_in_memory(
    files: Sequence[InputFile], tokenizer: Any, options: PrepareOptions, size: int, notify: Notify
) -> Outcome:
    whole, progress = Outcome(), PreparationProgress(size, notify)
    for chunk, outcome in prepare_all(chunks_of_all(files), tokenizer, options, None, 1):
        whole.add(outcome)
        progress(chunk, outcome)
    whole.parts = [joined(whole.parts)] if whole.parts else []
    return whole


def _left_out(outcome: Outcome, recipe: Recipe) -> tuple[Counter[str], int]:
    """Counts the rows that cannot be used, by kind, and apart from them those left out for their media."""
    kinds = Counter(outcome.kinds)
    return kinds, kinds.pop(MEDIA, 0) if recipe.drop_media else 0


def _check(outcome: Outcome, recipe: Recipe, files: Sequence[InputFile]) -> None:
    """Raises a DataError for bad rows and long rows that the recipe refuses, and if no example is left."""
    bad, media = _left_out(outcome, recipe)
    if bad and recipe.bad_rows == "refuse":
        raise _bad_rows([problem for problem in outcome.problems if problem.kind in bad], bad)
    assert outcome.report is not None
    count = sum(len(part) for part in outcome.parts)
    refuse_too_long(outcome.too_long, count, outcome.report, label_options(recipe))
    if not count:
        problem = f"no row is left: {bad.total():,} cannot be used and {media:,} have media"
        remedy = "See the reasons with: talik check DATA --model MODEL"
        raise DataError(problem, where=files[0].file.name, remedy=remedy)


def _bad_rows(problems: list[Problem], kinds: Counter[str]) -> DataError:
    """Returns the error for rows that cannot be used, with the first places and the number of each kind."""
    lines = [problems[0].text, *(f"{p.place}: {p.text}" for p in problems[1:SHOWN])]
    if kinds.total() > 1:
        lines.append(f"{kinds.total():,} rows in all")
    if len(kinds) > 1:
        lines.append("; ".join(f"{kind}: {number:,}" for kind, number in kinds.most_common()))
    remedy = f"Correct these rows or remove them from the file; {_SKIP}"
    if problems[0].kind in READING_PROBLEMS:
        remedy = f"{remedy_for(problems)} {_SKIP}"
    return DataError("\n".join(lines), where=problems[0].place, remedy=REMEDIES.get(problems[0].kind, remedy))
