"""The result of checking a data set: findings with their places, counts and numbers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from talik.check.statistics import Statistics
from talik.data.examples import Example
from talik.data.reading.rows import Place

LISTED = 2000  # findings of one kind that are kept; all are counted
MISSING = "missing value"


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

    @property
    def place(self) -> str:
        """The file, the line and the field, as people write them."""
        place = f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file}: row {self.line}"
        return place if self.field is None else f"{place}: {self.field}"


@dataclass(frozen=True, slots=True)
class Group:
    """All findings of one kind: their number, and the first LISTED of them in the order of the data."""

    severity: str
    kind: str
    count: int
    findings: list[Finding]


@dataclass(slots=True)
class Check:
    """What was found in a data set.

    Attributes:
        rows: Rows that were read.
        unread: Fields that no format reads, with their numbers of rows.
        facts: Facts about the chat template, in words.
        statistics: Numbers of the rows that can be used.
        examples: The first examples, to be shown.
        plan: What training would take, in words; empty if that was not asked.
    """

    rows: int = 0
    media: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    facts: list[str] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    examples: list[Example] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    _found: dict[tuple[str, str], list[Finding]] = field(default_factory=lambda: defaultdict(list))
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _files: dict[str, int] = field(default_factory=dict)  # in the order of the data

    def add(self, place: Place, field: str | None, kind: str, severity: str, text: str, remedy: str) -> None:
        """Counts a finding, and keeps it while there is room for its kind."""
        self._counts[severity, kind] += 1
        self._files.setdefault(place.file, len(self._files))
        if len(found := self._found[severity, kind]) < LISTED:
            found.append(Finding(place.file, place.line, place.unit, field, kind, severity, text, remedy))

    def settle(self) -> None:
        """Makes notes of problems that are so many that they are meant: data of extraction say "N/A"."""
        key = ("problem", MISSING)
        if self._counts[key] > max(10, self.rows // 100):
            self._counts["note", MISSING] += self._counts.pop(key)
            moved = [replace(finding, severity="note") for finding in self._found.pop(key)]
            self._found["note", MISSING] = (moved + self._found["note", MISSING])[:LISTED]

    @property
    def problems(self) -> int:
        """How many problems there are."""
        return sum(count for (severity, _), count in self._counts.items() if severity == "problem")

    @property
    def notes(self) -> int:
        """How many notes there are."""
        return sum(self._counts.values()) - self.problems

    @property
    def findings(self) -> list[Finding]:
        """The findings that were kept, in the order of the data."""
        found = [finding for findings in self._found.values() for finding in findings]
        return sorted(found, key=lambda finding: (self._files[finding.file], finding.line))

    def groups(self) -> Iterator[Group]:
        """The kinds of findings: problems first, the most frequent first."""
        order = sorted(self._counts.items(), key=lambda item: (item[0][0] != "problem", -item[1], item[0]))
        for key, count in order:
            if count:
                of_file = sorted(self._found[key], key=lambda one: (self._files[one.file], one.line))
                yield Group(*key, count, of_file)

    def as_dict(self) -> dict[str, Any]:
        """Everything for programs."""
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
