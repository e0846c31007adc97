"""All examples of some sources, and what came of their rows: refused, left out, or counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from talik.base.errors import DataError
from talik.base.events import Notify, Status
from talik.data.examples import Example
from talik.data.formats.formats import RowOptions
from talik.data.formats.media import MEDIA
from talik.data.labels import refuse_too_long
from talik.data.preparing.cache import Told, in_files, work_of
from talik.data.preparing.parts import joined
from talik.data.preparing.prepare import (
    OTHER_FORMAT,
    FileOptions,
    Outcome,
    PrepareOptions,
    chunks,
    file_options,
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

LARGE = 32 << 20  # bytes of data from which on all cores prepare it, into files
_PACKED = 5  # bytes of text in a byte of a compressed file, about
_COMPRESSED = (".gz", ".zst", ".xz", ".parquet")
_SKIP = "--bad-rows skip leaves them out and says so."
REMEDIES = {
    MEDIA: "--drop-media leaves rows with pictures, video or sound out.",
    "control token": "Only the chat template may write control tokens: take them out of the text, or train "
    "them as ordinary text with --control-tokens escape.",
    OTHER_FORMAT: f"Put the rows of each format into a file of its own; {_SKIP}",
}


@dataclass(frozen=True, slots=True)
class SourceCount:
    """How much of a set comes from one DATA argument."""

    path: str
    examples: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True, slots=True)
class Data:
    """Examples made of rows.

    Attributes:
        path: The sources, in words.
        use: What the examples are for.
        format: The formats that were recognised.
        examples: The examples.
        report: Counts of rows and examples.
        sources: How much comes from each source.
        problems: Rows that were left out, by kind.
        rejected: These rows as lines of JSON, each with its place and the reason.
        unread: Fields that are not read, with their numbers of rows.
        media: Rows with pictures, video or sound that were left out.
        ranges: For each source, the name and the range of its examples, where they follow each other.
    """

    path: str
    use: str
    format: str
    examples: Sequence[Example]
    report: Report
    sources: tuple[SourceCount, ...] = ()
    problems: dict[str, int] = field(default_factory=dict)
    rejected: Iterable[str] = ()
    unread: dict[str, int] = field(default_factory=dict)
    media: int = 0
    ranges: tuple[tuple[str, int, int], ...] = ()


@dataclass(slots=True)
class Prepared:
    """All examples of some sources, and what came of their rows."""

    examples: StoredExamples
    outcome: Outcome
    files: list[FileOptions]
    recipe: Recipe

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        sources: Sequence[DataSource],
        tokenizer: Any,
        load: Callable[[], Any] | None,
        notify: Notify,
    ) -> Prepared:
        """Reads the sources.

        Raises:
            DataError: There are rows that cannot be used and that are not to be skipped.
        """
        files = _files(recipe, sources, notify)
        options = PrepareOptions(label_options(recipe), recipe.seed)
        size = sum(_size(of.file) for of in files)
        if size < LARGE or load is None or any(of.file.name == INPUT for of in files):
            outcome = _in_memory(files, tokenizer, options, size, notify)
        else:
            outcome = in_files(files, tokenizer, options, load, size, notify)
        _check(outcome, recipe, files)
        places = [(of.file.name, _unit(of)) for of in files]
        return cls(StoredExamples(outcome.parts, places), outcome, files, recipe)

    def data(self, indices: Any, use: str, *, whole: bool = True) -> Data:
        """A set of the examples; `whole`: the counts of rows that are left out belong to it."""
        examples = self.examples.at(indices)
        bad, media = _left_out(self.outcome, self.recipe)
        skipped = bool(bad or media)
        return Data(
            ", ".join(dict.fromkeys(of.file.origin for of in self.files)),
            use,
            ", ".join(dict.fromkeys(of.form for of in self.files)),
            examples,
            self._report(examples, whole),
            tuple(self._counts(examples)),
            dict(bad) if whole else {},
            self.outcome.rejected if whole and skipped else (),
            dict(self.outcome.unread) if whole else {},
            media if whole else 0,
            tuple(self._ranges(examples)),
        )

    def _report(self, examples: StoredExamples, whole: bool) -> Report:
        report = self.outcome.report
        assert report is not None
        own = report if whole else Report(0, report.template, report.facts, longest=report.longest)
        return replace(
            own,
            rows=len(np.unique(examples.column("row")))
            if len(examples) != len(self.examples)
            else report.rows,
            examples=len(examples),
            tokens=int(examples.column("length").sum()),
            trained_tokens=int(examples.column("trained").sum()),
        )

    def _counts(self, examples: StoredExamples) -> Iterator[SourceCount]:
        """How much comes from each source, in the order of the sources; each has a name of its own."""
        names: Counter[str] = Counter()
        number, lengths = examples.column("file"), examples.column("length")
        trained = examples.column("trained")
        for source in dict.fromkeys(of.source for of in self.files):
            files = [of for of in self.files if of.source == source]
            mine = np.isin(number, [of.number for of in files])
            count, name = int(mine.sum()), files[0].file.origin
            names[name] += 1
            name += f" ({names[name]})" if names[name] > 1 else ""
            yield SourceCount(name, count, int(lengths[mine].sum()), int(trained[mine].sum()))

    def _ranges(self, examples: StoredExamples) -> Iterator[tuple[str, int, int]]:
        at = 0
        for count in self._counts(examples):
            if count.examples:
                yield count.path, at, at + count.examples
                at += count.examples


def label_options(recipe: Recipe) -> LabelOptions:
    """How a recipe wants examples to be made."""
    return LabelOptions(
        recipe.train_on, recipe.max_length, recipe.too_long, recipe.control_tokens, recipe.train_reasoning
    )


def _unit(of: FileOptions) -> str:
    return "row" if of.file.path.suffix in (".parquet", ".arrow") else "line"


def _size(file: DataFile) -> int:
    """Bytes of text in a file, about."""
    size = file.path.stat().st_size
    return size * _PACKED if file.path.suffix.lower() in _COMPRESSED else size


def _files(recipe: Recipe, sources: Sequence[DataSource], notify: Notify) -> list[FileOptions]:
    """The files of all sources, each with its format; a source without options has those of the recipe."""
    found: list[FileOptions] = []
    for number, source in enumerate(sources):
        own = RowOptions(source.input_field, source.output_field, source.format)
        of_recipe = RowOptions(recipe.input_field, recipe.output_field, recipe.format)
        options = of_recipe if own == RowOptions() else own
        left = source.limit
        for file in find_data(source.path, lambda line: notify(Status("data", line))):
            found.append(file_options(file, len(found), number, options, left))
            if left is not None:
                left -= sum(len(chunk.rows) for chunk in chunks(found[-1]))
                if left <= 0:
                    break
    return found


def _in_memory(
    files: Sequence[FileOptions], tokenizer: Any, options: PrepareOptions, size: int, notify: Notify
) -> Outcome:
    whole, told = Outcome(), Told(size, notify)
    for chunk, outcome in prepare_all(work_of(files), tokenizer, options, None, 1):
        whole.add(outcome)
        told(chunk, outcome)
    whole.parts = [joined(whole.parts)] if whole.parts else []
    return whole


def _left_out(outcome: Outcome, recipe: Recipe) -> tuple[Counter[str], int]:
    """How many rows cannot be used, by kind, and how many have media and are left out for that."""
    kinds = Counter(outcome.kinds)
    return kinds, kinds.pop(MEDIA, 0) if recipe.drop_media else 0


def _check(outcome: Outcome, recipe: Recipe, files: Sequence[FileOptions]) -> None:
    """DataError for what a recipe does not want to pass: bad rows, long rows, nothing left."""
    bad, media = _left_out(outcome, recipe)
    if bad and recipe.bad_rows == "refuse":
        raise _bad_rows([problem for problem in outcome.problems if problem.kind in bad], bad)
    assert outcome.report is not None
    count = sum(len(part) for part in outcome.parts)
    refuse_too_long(outcome.over, count, outcome.report, label_options(recipe))
    if not count:
        problem = f"no row is left: {bad.total():,} cannot be used and {media:,} have media"
        raise DataError(
            problem, where=files[0].file.name, remedy="Look at them: talik check DATA --model MODEL"
        )


def _bad_rows(problems: list[Problem], kinds: Counter[str]) -> DataError:
    """The error for rows that cannot be used: the first places, and the number of each kind."""
    lines = [problems[0].text, *(f"{p.place}: {p.text}" for p in problems[1:SHOWN])]
    if kinds.total() > 1:
        lines.append(f"{kinds.total():,} rows in all")
    if len(kinds) > 1:
        lines.append("; ".join(f"{kind}: {number:,}" for kind, number in kinds.most_common()))
    remedy = f"Correct these rows or take them out of the file; {_SKIP}"
    if problems[0].kind in READING_PROBLEMS:
        remedy = f"{remedy_for(problems)} {_SKIP}"
    return DataError("\n".join(lines), where=problems[0].place, remedy=REMEDIES.get(problems[0].kind, remedy))
