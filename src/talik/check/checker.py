"""All checks of a data set, in one reading.

check_rows(recipe, tokenizer).problems
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from talik.check.duplicates import Duplicates
from talik.check.statistics import Statistics
from talik.check.texts import text_problems
from talik.data.control_tokens import control_tokens, texts_of
from talik.data.examples import Example
from talik.data.formats import Converter, RowOptions, converter_of, other_format
from talik.data.labels import Labelled, Labeller
from talik.data.messages import Conversation, Document
from talik.data.prepared import label_options
from talik.data.reading import rows_of
from talik.data.rows import Place, Problem, Row, RowError
from talik.data.sources import find_data
from talik.data.streams import DataFile
from talik.data.template import template_of
from talik.data_source import DataSource
from talik.errors import DataError
from talik.events import Notify, Progress, Said, silent
from talik.recipe import Recipe

LISTED = 10_000  # findings that are kept; all are counted
CHUNK, PEEKED, SHOWN_EXAMPLES, SAMPLED = 512, 100, 20, 2000
OTHER_ROWS = "Correct the row, or leave such rows out with --bad-rows skip."
REMEDIES = {
    "media": "Leave such rows out with --drop-media.",
    "control token": "Train it as ordinary text with --control-tokens escape, or take it out.",
    "not written by the chat template": "Move the text into a message that the template writes.",
    "broken JSON": "Write one whole object on each line.",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found in one row.

    Attributes:
        severity: "problem" for what is refused, lost or taught wrongly; "note" for what may be meant.
    """

    file: str
    line: int
    unit: str
    field: str | None
    kind: str
    severity: str
    text: str
    remedy: str


@dataclass(slots=True)
class Check:
    """What was found in a data set.

    Attributes:
        findings: The first LISTED of them, in the order of the data.
        counts: Their numbers by severity and kind.
        rows: Rows that were read.
        unread: Fields that no format reads, with their numbers of rows.
        facts: Facts about the chat template, in words.
        statistics: Numbers of the rows that can be used.
        examples: The first examples, to be shown.
    """

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    rows: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    facts: list[str] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    examples: list[Example] = field(default_factory=list)

    @property
    def problems(self) -> int:
        """How many problems there are."""
        return sum(count for (severity, _), count in self.counts.items() if severity == "problem")

    def add(self, finding: Finding) -> None:
        """Counts a finding, and keeps it while there is room."""
        self.counts[finding.severity, finding.kind] += 1
        if len(self.findings) < LISTED:
            self.findings.append(finding)

    def as_dict(self) -> dict[str, Any]:
        """Everything for programs."""
        return {
            "rows": self.rows,
            "problems": self.problems,
            "counts": {
                severity: {kind: n for (s, kind), n in self.counts.most_common() if s == severity}
                for severity in ("problem", "note")
            },
            "findings": [asdict(finding) for finding in self.findings],
            "findings_left_out": sum(self.counts.values()) - len(self.findings),
            "fields_not_used": dict(self.unread),
            "template": self.facts,
            **self.statistics.as_dict(),
        }


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


class _Checker:
    def __init__(self, recipe: Recipe, tokenizer: Any, notify: Notify) -> None:
        self._recipe, self._tokenizer, self._notify = recipe, tokenizer, notify
        self._labeller = Labeller(template_of(tokenizer), label_options(recipe))
        self._control = control_tokens(self._labeller.template, self._labeller.facts)
        self._seen, self._done = Duplicates(), Check(facts=self._labeller.facts.lines())
        self._sampled = 0

    def run(self) -> Check:
        for evaluation, sources in ((False, self._recipe.data), (True, self._recipe.eval_data or ())):
            for source in sources:
                for file in find_data(source.path, lambda line: self._notify(Said("data", line))):
                    self._file(file, source, evaluation=evaluation)
        return self._done

    def _file(self, file: DataFile, source: DataSource, *, evaluation: bool) -> None:
        """Checks the rows of one file; what ends its reading is a problem of the file."""
        try:
            converter = self._converter(file, source)
            rows = islice(rows_of(file), source.limit)
            while chunk := list(islice(rows, CHUNK)):
                self._chunk(chunk, converter, evaluation=evaluation)
                self._notify(Progress("check", self._done.rows, 0, f"{self._done.rows:,} rows"))
            self._done.unread += converter.unread
        except DataError as error:
            place = error.where if isinstance(error.where, Place) else Place(file.name, 1)
            self._add(place, None, "file", error.problem, error.remedy or OTHER_ROWS)

    def _converter(self, file: DataFile, source: DataSource) -> Converter:
        first = [row for row in islice(rows_of(file), PEEKED) if isinstance(row, Row)]
        own = RowOptions(source.input_field, source.output_field, source.format)
        of_recipe = RowOptions(self._recipe.input_field, self._recipe.output_field, self._recipe.format)
        return converter_of(first, of_recipe if own == RowOptions() else own)

    def _chunk(self, rows: Sequence[Row | Problem], converter: Converter, *, evaluation: bool) -> None:
        made: list[Conversation | Document] = []
        for row in rows:
            self._done.rows += 1
            if isinstance(row, Problem):
                self._problem(row)
            elif (other := other_format(row, converter)) is not None:
                text = f"the row has the format '{other}', and the file '{converter.name}'"
                self._add(row.place, None, "another format", text, "Put it into a file of its own.")
            else:
                made += self._converted(row, converter)
        self._labelled(self._labeller.label([row for row in made if not self._has_control(row)]), made)
        for row in made:
            self._texts(row, evaluation=evaluation)

    def _converted(self, row: Row, converter: Converter) -> Iterator[Conversation | Document]:
        try:
            yield converter.convert(row)
        except RowError as error:
            self._problem(error.at(row.place), error.remedy)

    def _has_control(self, row: Conversation | Document) -> bool:
        """Whether a row holds control tokens that are refused; each place is a problem."""
        if self._recipe.control_tokens != "refuse":
            return False
        found = [(name, match) for name, text in texts_of(row) if (match := self._control.search(text))]
        for name, match in found:
            text = f"{name} holds the control token {match[0]!r} at character {match.start() + 1:,}"
            self._add(row.place, name, "control token", text, REMEDIES["control token"])
        return bool(found)

    def _labelled(self, labelled: Labelled, made: Sequence[Conversation | Document]) -> None:
        for problem in labelled.problems:
            self._problem(problem)
        for place, text in labelled.over:
            remedy = f"Raise --max-length to {labelled.report.longest}, or shorten the row."
            self._add(place, None, f"too long: {text.rpartition(': ')[2]}", text, remedy)
        statistics = self._done.statistics
        statistics.add_examples(labelled.examples)
        self._done.examples += labelled.examples[: SHOWN_EXAMPLES - len(self._done.examples)]
        for row in made:
            statistics.add_row(row)
        if self._sampled < SAMPLED:
            self._sampled += len(made)
            statistics.add_tokens(
                [text[:SAMPLED] for row in made for _, text in texts_of(row)], self._tokenizer
            )

    def _texts(self, row: Conversation | Document, *, evaluation: bool) -> None:
        for found in text_problems(row):
            self._add(row.place, found.field, found.kind, found.text, found.remedy, found.severity)
        remedy = "Keep one of them."
        for kind, severity, text in self._seen.add(row, evaluation=evaluation):
            self._add(row.place, None, kind, text, remedy, severity)

    def _problem(self, problem: Problem, remedy: str | None = None) -> None:
        remedy = remedy or REMEDIES.get(problem.kind, OTHER_ROWS)
        self._add(problem.place, problem.field, problem.kind, problem.text, remedy)

    def _add(
        self, place: Place, field: str | None, kind: str, text: str, remedy: str, severity: str = "problem"
    ) -> None:
        self._done.add(Finding(place.file, place.line, place.unit, field, kind, severity, text, remedy))
