"""The result of a check of a data set: findings with their places, counts and statistics."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from talik.check.statistics import Statistics
from talik.data.examples import Example
from talik.data.reading.rows import Place

LISTED = 2000  # findings of each kind that are kept; all are counted
MISSING = "missing value"


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding in one row.

    Attributes:
        file: The name of the file.
        line: The number of the line or row.
        unit: "line" or "row".
        field: The field or message, if the finding is about one.
        kind: The kind of finding: a few words, the same for all such rows.
        severity: "problem" for content that is refused, lost or harmful; "note" for content that may be
            intended.
        text: A description.
        remedy: The action to take.
    """

    file: str
    line: int
    unit: str
    field: str | None
    kind: str
    severity: str
    text: str
    remedy: str

    @property
    def place(self) -> str:
        """The file, the line and the field as text."""
        place = f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file}: row {self.line}"
        return place if self.field is None else f"{place}: {self.field}"


@dataclass(frozen=True, slots=True)
class Group:
    """All findings of one kind: their number, and the first LISTED findings in the order of the data."""

    severity: str
    kind: str
    count: int
    findings: list[Finding]


@dataclass(slots=True)
class Check:
    """The result of a check.

    Attributes:
        rows: The number of rows that were read.
        media: The number of rows with images, video or audio that were left out.
        unread: For each field that is not used, the number of rows that have it.
        facts: The facts about the chat template, in words.
        statistics: The statistics of the rows that can be used.
        examples: The first examples.
        plan: A summary of the plan for training; empty if it was not requested.
    """

    rows: int = 0
    media: int = 0
    unread: Counter[str] = field(default_factory=Counter[str])
    facts: list[str] = field(default_factory=list[str])
    statistics: Statistics = field(default_factory=Statistics)
    examples: list[Example] = field(default_factory=list[Example])
    plan: list[str] = field(default_factory=list[str])
    _found: dict[tuple[str, str], list[Finding]] = field(default_factory=lambda: defaultdict(list))
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    _files: dict[str, int] = field(default_factory=dict[str, int])  # in the order of the data

    def add(self, place: Place, field: str | None, kind: str, severity: str, text: str, remedy: str) -> None:
        """Counts a finding, and keeps it if it is among the first LISTED of its kind."""
        self._counts[severity, kind] += 1
        self._files.setdefault(place.file, len(self._files))
        if len(found := self._found[severity, kind]) < LISTED:
            found.append(Finding(place.file, place.line, place.unit, field, kind, severity, text, remedy))

    def settle(self) -> None:
        """Turns frequent missing values into notes: extraction data use answers like "N/A" on purpose."""
        key = ("problem", MISSING)
        if self._counts[key] > max(10, self.rows // 100):
            self._counts["note", MISSING] += self._counts.pop(key)
            moved = [replace(finding, severity="note") for finding in self._found.pop(key)]
            self._found["note", MISSING] = (moved + self._found["note", MISSING])[:LISTED]

    @property
    def problems(self) -> int:
        """The number of problems."""
        return sum(count for (severity, _), count in self._counts.items() if severity == "problem")

    @property
    def notes(self) -> int:
        """The number of notes."""
        return sum(self._counts.values()) - self.problems

    @property
    def findings(self) -> list[Finding]:
        """The findings that were kept, in the order of the data."""
        found = [finding for findings in self._found.values() for finding in findings]
        return sorted(found, key=lambda finding: (self._files[finding.file], finding.line))

    def groups(self) -> Iterator[Group]:
        """Yields the findings of each kind: problems first, then by descending count."""
        order = sorted(self._counts.items(), key=lambda item: (item[0][0] != "problem", -item[1], item[0]))
        for key, count in order:
            if count:
                findings = sorted(self._found[key], key=lambda one: (self._files[one.file], one.line))
                yield Group(*key, count, findings)

    def as_dict(self) -> dict[str, Any]:
        """Returns the whole result in a form for programs."""
        counts = {group.severity: dict[str, int]() for group in self.groups()}
        for group in self.groups():
            counts[group.severity][group.kind] = group.count
        return {
            "rows": self.rows,
            "problems": self.problems,
            "notes": self.notes,
            "counts": {"problem": counts.get("problem", {}), "note": counts.get("note", {})},
            "findings": [asdict(finding) for finding in self.findings],
            "findings_left_out": self.problems + self.notes - len(self.findings),
            "rows_with_media_left_out": self.media,
            "fields_not_used": dict(self.unread),
            "template": self.facts,
            "plan": self.plan,
            **self.statistics.as_dict(),
        }
