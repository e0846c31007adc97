"""Runs all checks of a data set: reads a sample, and then all rows once.

check_rows(recipe, tokenizer).problems
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from talik.base.errors import DataError
from talik.base.events import Notify, Progress, Status, silent
from talik.check.duplicates import Duplicates
from talik.check.result import Check
from talik.check.statistics import lost_at
from talik.check.text_checks import FOREIGN_MARKS, text_problems, texts_with_roles
from talik.data.examples import Example, cut
from talik.data.formats.file_format import file_converter, row_options
from talik.data.formats.formats import OTHER_FORMAT, Converter
from talik.data.formats.media import MEDIA
from talik.data.labels import Labelled, Labeller
from talik.data.messages import Conversation, Document
from talik.data.preparing.prepared_data import label_options
from talik.data.reading.file_rows import rows_of
from talik.data.reading.rows import Place, Problem, Row, RowError
from talik.data.reading.sources import find_data
from talik.data.reading.streams import DataFile
from talik.data.templates.content_checks import NOT_WRITTEN
from talik.data.templates.control_tokens import CONTROL_TOKEN, control_tokens, texts_of
from talik.data.templates.template import template_of
from talik.recipe.data_source import DataSource
from talik.recipe.recipe import Recipe

CHUNK = 512  # rows that are checked at a time
SHOWN_EXAMPLES, SHOWN_TOKENS = 20, 1000
SAMPLE_ROWS = 2000  # rows of the sample that shows which word pairs many rows share
TOKENISED_ROWS = 2000  # rows whose texts are tokenised separately, to measure each script
UNLIMITED = 2**31 - 1
OTHER_ROWS = "Correct the row, or leave such rows out with --bad-rows skip."
REMEDIES = {
    MEDIA: "Leave such rows out with --drop-media.",
    CONTROL_TOKEN: "Remove it, or train it as ordinary text with --control-tokens escape.",
    NOT_WRITTEN: "Move the text into a message that the template writes.",
    OTHER_FORMAT: "Put it into a file of its own.",
    "broken JSON": "Write one complete object on each line.",
    "wrong number of fields": "Put quotes around a field that contains a delimiter, quote or line break.",
    "preferences": "Keep only the good answers, in a format with one answer.",
}
Made = Conversation | Document


def check_rows(recipe: Recipe, tokenizer: Any, notify: Notify = silent) -> Check:
    """Checks all rows of a recipe's training and evaluation data.

    Args:
        recipe: Names the data and the options.
        tokenizer: A tokenizer of Transformers.
        notify: Gets events about the progress.

    Raises:
        DataError: A source does not exist.
        UsageError: The chat template or an option is not valid.
    """
    return _Checker(recipe, tokenizer, notify).run()


@dataclass(slots=True)
class _Source:
    """A source and its files; `left` is the number of rows that its limit still allows."""

    of: DataSource
    files: list[DataFile]
    evaluation: bool
    left: int | None


class _Checker:
    """Reads the rows of all files and collects findings about them."""

    def __init__(self, recipe: Recipe, tokenizer: Any, notify: Notify) -> None:
        self._recipe, self._tokenizer, self._notify = recipe, tokenizer, notify
        options = replace(label_options(recipe), max_length=UNLIMITED)  # `_length` checks lengths
        self._labeller = Labeller(template_of(tokenizer), options)
        self._control = control_tokens(self._labeller.template, self._labeller.facts)
        self._seen = Duplicates(recipe.seed, 0.0 if recipe.eval_data else recipe.held_out)
        self._done = Check(facts=self._labeller.facts.lines())
        self._unknown = _unknown_id(self._labeller)
        self._tokenised = 0
        self._mixed: dict[tuple[str, str], list[Place]] = {}

    def run(self) -> Check:
        """Runs all checks."""
        sources = self._sources()
        self._seen.learn(self._sample(sources))
        for source in sources:
            for file in source.files:
                self._file(file, source)
        for found in self._seen.repeats():
            self._done.add(found.place, None, found.kind, found.severity, found.text, found.remedy)
        self._other_scripts()
        self._done.settle()
        return self._done

    def _sources(self) -> list[_Source]:
        def say(line: str) -> None:
            self._notify(Status("data", line))

        given = [(of, False) for of in self._recipe.data]
        given += [(of, True) for of in self._recipe.eval_data or ()]
        return [_Source(of, find_data(of.path, say), evaluation, of.limit) for of, evaluation in given]

    def _sample(self, sources: Sequence[_Source]) -> list[Made]:
        """Draws a sample from all rows of the training data (reservoir sampling)."""
        draw, drawn, count = random.Random(0), list[tuple[Row, Converter]](), 0
        for source in sources:
            for file in source.files if not source.evaluation else ():
                try:
                    converter = self._converter(file, source.of)
                    for row in rows_of(file):
                        count += 1
                        at = count - 1 if count <= SAMPLE_ROWS else draw.randrange(count)
                        if isinstance(row, Row) and at < SAMPLE_ROWS:
                            drawn[at : at + 1] = [(row, converter)]
                except DataError:  # reported when the file is checked
                    continue
        return [made for row, converter in drawn for made in _converted(row, converter)]

    def _file(self, file: DataFile, source: _Source) -> None:
        """Checks the rows of one file; an error that ends its reading becomes a problem of the file."""
        try:
            converter = self._converter(file, source.of)
            converter.unread.clear()
            rows = rows_of(file)
            while chunk := list(islice(rows, CHUNK if source.left is None else min(CHUNK, source.left))):
                source.left = None if source.left is None else source.left - len(chunk)
                self._chunk(chunk, converter, evaluation=source.evaluation)
                self._notify(Progress("check", self._done.rows, 0, f"{self._done.rows:,} rows"))
            self._done.unread += converter.unread
        except DataError as error:
            place = error.where if isinstance(error.where, Place) else Place(file.name, 1)
            self._add(place, None, "unreadable file", error.problem, error.remedy or OTHER_ROWS)

    def _converter(self, file: DataFile, source: DataSource) -> Converter:
        return file_converter(file, row_options(source, self._recipe))

    def _chunk(self, rows: Sequence[Row | Problem], converter: Converter, *, evaluation: bool) -> None:
        made: list[Made] = []
        for row in rows:
            self._done.rows += 1
            if isinstance(row, Problem):
                self._problem(row)
            else:
                try:
                    made.append(converter.convert(row))
                except RowError as error:
                    self._problem(error.at(row.place), error.remedy)
        self._labelled(self._labeller.label([row for row in made if not self._has_control(row)]))
        for row in made:
            self._row(row, evaluation=evaluation)

    def _has_control(self, row: Made) -> bool:
        """Adds a finding for each text with control tokens; True if the row is refused because of them."""
        found = [(name, match) for name, text in texts_of(row) if (match := self._control.search(text))]
        refused = self._recipe.control_tokens == "refuse"
        how = {"escape": "trained as ordinary text", "keep": "trained as a control token"}
        for name, match in found:
            text = f"contains the control token {match[0]!r} at character {match.start() + 1:,}"
            if refused:
                self._add(row.place, name, CONTROL_TOKEN, text, REMEDIES[CONTROL_TOKEN])
            else:
                text += f", which is {how[self._recipe.control_tokens]}"
                remedy = "Nothing, if the text is about control tokens."
                self._add(row.place, name, CONTROL_TOKEN, text, remedy, "note")
        return refused and bool(found)

    def _labelled(self, labelled: Labelled) -> None:
        for problem in labelled.problems:
            self._problem(problem)
        for example in labelled.examples:
            self._done.statistics.add_example(example)
            self._length(example)
            if self._unknown is not None and self._unknown in example.input_ids:
                count = example.input_ids.count(self._unknown)
                text = f"the tokenizer cannot encode parts of the text: {count:,} tokens are unknown"
                remedy = "Replace these characters, or use a model whose tokenizer has them."
                self._add(example.place, None, "unknown tokens", text, remedy)
        for example in labelled.examples[: SHOWN_EXAMPLES - len(self._done.examples)]:
            self._done.examples.append(cut(example, SHOWN_TOKENS))

    def _length(self, example: Example) -> None:
        """Adds a problem if a cut at the greatest length loses trained tokens; documents are split."""
        limit = self._recipe.max_length
        if example.length <= limit or (len(example.spans) == 2 and example.spans[0].stop == 1):
            return
        if (lost := lost_at(example, limit)) is not None:
            does = {"drop": "dropped", "cut": "cut" if lost != "prompt cut" else "dropped"}
            what = does.get(self._recipe.too_long, "refused")
            text = f"{example.length:,} tokens, over --max-length {limit:,}: the example is {what} ({lost})"
            remedy = "Raise --max-length, or shorten the row. The statistics show the loss at each length."
            self._add(example.place, None, "too long", text, remedy)

    def _row(self, row: Made, *, evaluation: bool) -> None:
        for found in text_problems(row):
            self._add(row.place, found.field, found.kind, found.text, found.remedy, found.severity)
        self._foreign_marks(row)
        self._seen.add(row, evaluation=evaluation)
        scripts = self._done.statistics.add_row(row)
        if len(places := self._mixed.setdefault(scripts, [])) < CHUNK:
            places.append(row.place)
        if self._tokenised < TOKENISED_ROWS:
            self._tokenised += 1
            self._done.statistics.add_tokens([text for _, text in texts_of(row)], self._tokenizer)

    def _other_scripts(self) -> None:
        """Adds a note for each answer in another script than its question, if few rows are like that."""
        for (asked, said), places in self._mixed.items():
            if (
                asked != said
                and "other" not in (asked, said)
                and len(places) <= max(3, self._done.rows // 200)
            ):
                for place in places:
                    text = f"the question is in {asked} letters and the answer in {said}"
                    remedy = "Check the row: few rows of the data are like this."
                    self._add(place, None, "answer in another script", text, remedy, "note")

    def _foreign_marks(self, row: Made) -> None:
        severity = "problem" if self._recipe.control_tokens == "refuse" else "note"
        for name, text, _ in texts_with_roles(row):
            marks = (mark for mark in FOREIGN_MARKS.finditer(text) if not self._control.fullmatch(mark[0]))
            if (found := next(marks, None)) is not None:
                text = f"contains {found[0]!r}, a mark of another model's template"
                remedy = "Split the text into messages. If it is about templates: --control-tokens escape."
                self._add(row.place, name, "marks of another template", text, remedy, severity)

    def _problem(self, problem: Problem, remedy: str | None = None) -> None:
        if problem.kind == MEDIA and self._recipe.drop_media:
            self._done.media += 1
            return
        remedy = remedy or REMEDIES.get(problem.kind, OTHER_ROWS)
        self._add(problem.place, problem.field, problem.kind, problem.text, remedy)

    def _add(
        self, place: Place, field: str | None, kind: str, text: str, remedy: str, severity: str = "problem"
    ) -> None:
        self._done.add(place, field, kind, severity, text, remedy)


def _converted(row: Row, converter: Converter) -> Iterator[Made]:
    try:
        yield converter.convert(row)
    except RowError:
        return


def _unknown_id(labeller: Labeller) -> int | None:
    """Returns the id of the unknown token; None if it also has another use."""
    tokenizer = labeller.template.tokenizer
    token = tokenizer.unk_token
    others = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, *labeller.facts.ends)
    return None if token is None or token in others else tokenizer.unk_token_id
