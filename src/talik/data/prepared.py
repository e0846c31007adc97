"""All examples of some sources, and what came of their rows: refused, left out, or counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from talik.data.examples import Example
from talik.data.formats import RowOptions
from talik.data.kept import Told, in_files, work_of
from talik.data.labels import refuse_too_long
from talik.data.prepare import (
    FileOptions,
    Outcome,
    PrepareOptions,
    chunks,
    file_options,
    prepare_all,
)
from talik.data.reading import READING, remedy_for
from talik.data.report import LabelOptions, Report
from talik.data.rows import SHOWN, Place
from talik.data.sources import find_data
from talik.data.store import StoredExamples, joined
from talik.data_source import DataSource
from talik.errors import DataError
from talik.events import Notify, Said
from talik.recipe import Recipe

LARGE = 32 << 20  # bytes of data from which on all cores prepare it, into files


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
        rejected: These rows, each with its place and the reason.
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
    rejected: Sequence[dict[str, Any]] = ()
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
        keep = recipe.bad_rows == "skip"
        options = PrepareOptions(label_options(recipe), recipe.drop_media, keep, recipe.seed)
        size = sum(of.file.path.stat().st_size for of in files)
        if size < LARGE or load is None or any(of.file.name == "-" for of in files):
            outcome = _in_memory(files, tokenizer, options, size, notify)
        else:
            outcome = in_files(files, tokenizer, options, load, size, notify)
        _check(outcome, recipe, files)
        places = [(of.file.name, _unit(of)) for of in files]
        return cls(StoredExamples(outcome.parts, places), outcome, files, recipe)

    def data(self, indices: Any, use: str, *, whole: bool = True) -> Data:
        """A set of the examples; `whole`: the counts of rows belong to it."""
        examples = self.examples.at(indices)
        outcome, report = self.outcome, self.outcome.report
        assert report is not None
        tokens, trained = int(examples.column("length").sum()), int(examples.column("trained").sum())
        rows = len(
            {*zip(examples.column("file_number").tolist(), examples.column("line").tolist(), strict=True)}
        )
        kept = {"rows": rows} if not whole or len(examples) < len(self.examples) else {}
        own = report if whole else Report(rows, report.template, report.facts, longest=report.longest)
        own = replace(own, **kept, examples=len(examples), tokens=tokens, trained_tokens=trained)
        return Data(
            ", ".join(dict.fromkeys(of.file.origin for of in self.files)),
            use,
            ", ".join(dict.fromkeys(of.form for of in self.files)),
            examples,
            own,
            tuple(self._counts(examples)),
            dict(outcome.kinds) if whole else {},
            outcome.rejected if whole else (),
            dict(outcome.unread) if whole else {},
            outcome.media if whole else 0,
            tuple(self._ranges(examples)),
        )

    def _counts(self, examples: StoredExamples) -> Iterator[SourceCount]:
        number, lengths = examples.column("file_number"), examples.column("length")
        trained = examples.column("trained")
        for origin in dict.fromkeys(of.file.origin for of in self.files):
            mine = np.isin(number, [of.number for of in self.files if of.file.origin == origin])
            yield SourceCount(origin, int(mine.sum()), int(lengths[mine].sum()), int(trained[mine].sum()))

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


def _files(recipe: Recipe, sources: Sequence[DataSource], notify: Notify) -> list[FileOptions]:
    """The files of all sources, each with its format; a source without options has those of the recipe."""
    found: list[FileOptions] = []
    for source in sources:
        own = RowOptions(source.input_field, source.output_field, source.format)
        of_recipe = RowOptions(recipe.input_field, recipe.output_field, recipe.format)
        options = of_recipe if own == RowOptions() else own
        left = source.limit
        for file in find_data(source.path, lambda line: notify(Said("data", line))):
            found.append(file_options(file, len(found), options, left))
            if left is not None:
                left -= sum(chunk.of.limit is not None and len(chunk.rows) for chunk in chunks(found[-1]))
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


def _check(outcome: Outcome, recipe: Recipe, files: Sequence[FileOptions]) -> None:
    """DataError for what a recipe does not want to pass: mixed formats, bad rows, long rows, nothing left."""
    _refuse_mixed(outcome)
    if outcome.kinds and recipe.bad_rows == "refuse":
        raise _bad_rows(outcome)
    assert outcome.report is not None
    count = sum(len(part) for part in outcome.parts)
    refuse_too_long(outcome.over, count, outcome.report, label_options(recipe))
    if not count:
        left_out = sum(outcome.kinds.values())
        problem = f"no row is left: {left_out:,} cannot be used and {outcome.media:,} have media"
        raise DataError(
            problem, where=files[0].file.name, remedy="Look at them: talik check DATA --model MODEL"
        )


def _bad_rows(outcome: Outcome) -> DataError:
    """The error for rows that cannot be used: the first places, and the number of each kind."""
    problems = outcome.problems
    count = sum(outcome.kinds.values())
    lines = [problems[0].text, *(f"{p.place}: {p.text}" for p in problems[1:SHOWN])]
    if count > 1:
        lines.append(f"{count:,} rows in all")
    if len(outcome.kinds) > 1:
        lines.append("; ".join(f"{kind}: {number:,}" for kind, number in outcome.kinds.most_common()))
    remedy = "Correct these rows or take them out of the file; --bad-rows skip leaves them out and says so."
    if problems[0].kind in READING:
        remedy = f"{remedy_for(problems)} --bad-rows skip leaves such rows out and says so."
    if problems[0].kind == "media":
        remedy = "--drop-media leaves rows with pictures, video or sound out."
    if problems[0].kind == "control token":
        remedy = (
            "Only the chat template may write control tokens: take them out of the text, or train them as "
            "ordinary text with --control-tokens escape."
        )
    return DataError("\n".join(lines), where=problems[0].place, remedy=remedy)


def _refuse_mixed(outcome: Outcome) -> None:
    """DataError for rows of several formats in one file."""
    files: dict[str, dict[str, Place]] = {}
    for (file, name), place in outcome.formats.items():
        files.setdefault(file, {})[name] = place
    for places in files.values():
        if len(places) > 1:
            named = ", ".join(f"'{name}' first in {place}" for name, place in places.items())
            raise DataError(
                f"the rows have {len(places)} formats: {named}",
                where=next(iter(places.values())),
                remedy="Put the rows of each format into a file of its own.",
            )
