"""All checks of a data set, in one reading after a look at a sample.

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
from talik.data.formats.formats import Converter, RowOptions, converter_of, other_format
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

CHUNK, PEEKED = 512, 100
SHOWN_EXAMPLES, SHOWN_TOKENS = 20, 1000
LEARNT = 2000  # rows of a sample that shows which words all rows share
TOKENISED = 2000  # rows whose texts are tokenised once more, by script
UNLIMITED = 2**31 - 1
OTHER_ROWS = "Correct the row, or leave such rows out with --bad-rows skip."
REMEDIES = {
    MEDIA: "Leave such rows out with --drop-media.",
    CONTROL_TOKEN: "Take it out, or train it as ordinary text with --control-tokens escape.",
    NOT_WRITTEN: "Move the text into a message that the template writes.",
    "broken JSON": "Write one whole object on each line.",
    "wrong number of fields": "Put quotes around a field that holds the delimiter, a quote or a line break.",
    "preferences": "Keep the good answers alone, in a format with one answer.",
}
Made = Conversation | Document


def check_rows(recipe: Recipe, tokenizer: Any, notify: Notify = silent) -> Check:
    """Checks all rows of a recipe's data, and of the data to evaluate on against them.

    Args:
        recipe: Names the data and the options.
        tokenizer: A tokenizer of Transformers.
        notify: Told how far it has come.

    Raises:
        DataError: There is nothing to read.
        UsageError: The chat template or an option cannot be used.
    """
    return _Checker(recipe, tokenizer, notify).run()


@dataclass(slots=True)
class _Source:
    """A source of rows and its files; `left`: rows that its limit leaves."""

    of: DataSource
    files: list[DataFile]
    evaluation: bool
    left: int | None


class _Checker:
    def __init__(self, recipe: Recipe, tokenizer: Any, notify: Notify) -> None:
        self._recipe, self._tokenizer, self._notify = recipe, tokenizer, notify
        options = replace(label_options(recipe), max_length=UNLIMITED)  # lengths are compared here
        self._labeller = Labeller(template_of(tokenizer), options)
        self._control = control_tokens(self._labeller.template, self._labeller.facts)
        self._seen = Duplicates(recipe.seed, 0.0 if recipe.eval_data else recipe.held_out)
        self._done = Check(facts=self._labeller.facts.lines())
        self._unknown = _unknown_id(self._labeller)
        self._tokenised = 0
        self._mixed: dict[tuple[str, str], list[Place]] = {}

    def run(self) -> Check:
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
        """Rows drawn from all files to train on."""
        draw, drawn, count = random.Random(0), list[tuple[Row, Converter]](), 0
        for source in sources:
            for file in source.files if not source.evaluation else ():
                try:
                    converter = self._converter(file, source.of)
                    for row in rows_of(file):
                        count += 1
                        at = count - 1 if count <= LEARNT else draw.randrange(count)
                        if isinstance(row, Row) and at < LEARNT:
                            drawn[at : at + 1] = [(row, converter)]
                except DataError:  # told when the file is checked
                    continue
        return [made for row, converter in drawn for made in _converted(row, converter)]

    def _file(self, file: DataFile, source: _Source) -> None:
        """Checks the rows of one file; what ends its reading is a problem of the file."""
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
        first = [row for row in islice(rows_of(file), PEEKED) if isinstance(row, Row)]
        own = RowOptions(source.input_field, source.output_field, source.format)
        of_recipe = RowOptions(self._recipe.input_field, self._recipe.output_field, self._recipe.format)
        return converter_of(first, of_recipe if own == RowOptions() else own)

    def _chunk(self, rows: Sequence[Row | Problem], converter: Converter, *, evaluation: bool) -> None:
        made: list[Made] = []
        for row in rows:
            self._done.rows += 1
            if isinstance(row, Problem):
                self._problem(row)
            elif (other := other_format(row, converter)) is not None:
                text = f"the row has the format '{other}', and the file '{converter.name}'"
                self._add(row.place, None, "another format", text, "Put it into a file of its own.")
            else:
                try:
                    made.append(converter.convert(row))
                except RowError as error:
                    self._problem(error.at(row.place), error.remedy)
        self._labelled(self._labeller.label([row for row in made if not self._has_control(row)]))
        for row in made:
            self._row(row, evaluation=evaluation)

    def _has_control(self, row: Made) -> bool:
        """Whether a row holds control tokens that are refused; each place is a problem, else a note."""
        found = [(name, match) for name, text in texts_of(row) if (match := self._control.search(text))]
        refused = self._recipe.control_tokens == "refuse"
        how = {"escape": "trained as ordinary text", "keep": "kept as a control token"}
        for name, match in found:
            text = f"holds the control token {match[0]!r} at character {match.start() + 1:,}"
            if refused:
                self._add(row.place, name, CONTROL_TOKEN, text, REMEDIES[CONTROL_TOKEN])
            else:
                text += f", which is {how[self._recipe.control_tokens]}"
                remedy = "Nothing, if the text talks about control tokens."
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
                text = f"the tokenizer has no tokens for parts of the text: {count:,} are unknown"
                remedy = "Replace these characters, or choose a model that knows them."
                self._add(example.place, None, "unknown tokens", text, remedy)
        for example in labelled.examples[: SHOWN_EXAMPLES - len(self._done.examples)]:
            self._done.examples.append(cut(example, SHOWN_TOKENS))

    def _length(self, example: Example) -> None:
        """A problem if an example loses trained tokens at the greatest length; documents are split."""
        limit = self._recipe.max_length
        if example.length <= limit or (len(example.spans) == 2 and example.spans[0].stop == 1):
            return
        if (lost := lost_at(example, limit)) is not None:
            does = {"drop": "dropped", "cut": "cut" if lost != "prompt cut" else "dropped"}
            what = does.get(self._recipe.too_long, "refused")
            text = f"{example.length:,} tokens, over --max-length {limit:,}: the example is {what} ({lost})"
            remedy = "Raise --max-length, or shorten the row: the numbers say what each length loses."
            self._add(example.place, None, "too long", text, remedy)

    def _row(self, row: Made, *, evaluation: bool) -> None:
        for found in text_problems(row):
            self._add(row.place, found.field, found.kind, found.text, found.remedy, found.severity)
        self._foreign_marks(row)
        self._seen.add(row, evaluation=evaluation)
        scripts = self._done.statistics.add_row(row)
        if len(places := self._mixed.setdefault(scripts, [])) < CHUNK:
            places.append(row.place)
        if self._tokenised < TOKENISED:
            self._tokenised += 1
            self._done.statistics.add_tokens([text for _, text in texts_of(row)], self._tokenizer)

    def _other_scripts(self) -> None:
        """Notes on answers in another script than their questions, where few rows are so."""
        for (asked, said), places in self._mixed.items():
            if (
                asked != said
                and "other" not in (asked, said)
                and len(places) <= max(3, self._done.rows // 200)
            ):
                for place in places:
                    text = f"the question is in {asked} letters and the answer in {said}"
                    remedy = "Look at the row: few rows of the data are like this."
                    self._add(place, None, "answer in another script", text, remedy, "note")

    def _foreign_marks(self, row: Made) -> None:
        severity = "problem" if self._recipe.control_tokens == "refuse" else "note"
        for name, text, _ in texts_with_roles(row):
            marks = (mark for mark in FOREIGN_MARKS.finditer(text) if not self._control.fullmatch(mark[0]))
            if (found := next(marks, None)) is not None:
                text = f"holds {found[0]!r}, a mark of another model's template"
                remedy = "Split the text into messages; if it talks about templates: --control-tokens escape."
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
        if other_format(row, converter) is None:
            yield converter.convert(row)
    except RowError:
        return


def _unknown_id(labeller: Labeller) -> int | None:
    """The id of the unknown token, unless it has another use as well."""
    tokenizer = labeller.template.tokenizer
    token = tokenizer.unk_token
    others = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, *labeller.facts.ends)
    return None if token is None or token in others else tokenizer.unk_token_id
