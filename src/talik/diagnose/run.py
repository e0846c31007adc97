"""Explains the memory of a run: planned and measured peaks, and why it ran out of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talik.base.errors import RunError
from talik.base.files import format_bytes, quoted, read_json
from talik.diagnose.findings import Finding
from talik.plan.target import slack_of

BROKEN = "broken.json"
Rows = Mapping[str, Mapping[str, int]]  # of phases: "promised" and "measured" bytes


@dataclass(frozen=True, slots=True)
class RunExplanation:
    """The memory of a run compared with its plan.

    Attributes:
        memory: Promised and measured bytes by phase.
        findings: Why the run ended, and the phases that took more than promised.
    """

    memory: Rows
    findings: tuple[Finding, ...]

    @property
    def promised(self) -> int:
        """The highest promised peak of all phases in bytes; 0 if the plan has none."""
        return _highest(self.memory, "promised")

    @property
    def measured(self) -> int:
        """The highest measured peak of all phases in bytes."""
        return _highest(self.memory, "measured")

    @property
    def kept(self) -> bool | None:
        """True if the measured peak is within the promised one and its slack; None without a promise."""
        return self.measured <= self.promised + slack_of(self.promised) if self.promised else None

    def as_dict(self) -> dict[str, Any]:
        """All values, for JSON."""
        return {
            "kept_promise": self.kept,
            "promised_bytes": self.promised,
            "measured_bytes": self.measured,
            "memory": self.memory,
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def __str__(self) -> str:
        return "\n\n".join([self._verdict(), *map(str, self.findings)])

    def _verdict(self) -> str:
        measured = f"{format_bytes(self.measured)} measured at the peak"
        if self.kept is None:
            return f"the plan has no planned peaks: {measured}"
        promised, slack = format_bytes(self.promised), format_bytes(slack_of(self.promised))
        did = "kept" if self.kept else "broke"
        return f"the run {did} its promise: {measured}, {promised} promised with a slack of {slack}"


def explain_run(folder: Path) -> RunExplanation:
    """Compares the memory of a run that ended or ran out of memory with its plan.

    Raises:
        RunError: The folder is not a run, or the run has not ended.
    """
    if (folder / BROKEN).is_file():
        broken = read_json(folder / BROKEN)
        return RunExplanation(broken["memory"], (_broken(folder, broken),))
    if not (folder / "results.json").is_file():
        raise RunError("the run has not ended", where=folder, remedy=f"Go on: talik resume {quoted(folder)}")
    memory = read_json(folder / "results.json")["memory"]
    return RunExplanation(memory, tuple(_beyond(memory)))


def _highest(memory: Rows, use: str) -> int:
    return max((row.get(use, 0) for row in memory.values()), default=0)


def _broken(folder: Path, broken: dict[str, Any]) -> Finding:
    phase, memory = broken["phase"], broken["memory"]
    measured = memory.get(phase, {}).get("measured", 0)
    needed = format_bytes(_highest(memory, "promised") + slack_of(_highest(memory, "promised")))
    if RunExplanation(memory, ()).kept:
        why = "The run kept its promise: another program on this machine, or a limit, took the memory."
        line = f"talik resume {quoted(folder)}  # once {needed} are free"
    else:
        why = "The run took more memory than promised."
        line = "talik train ... --memory SIZE  # with a smaller SIZE: another way is chosen, with more room"
    what = f"{broken['problem'][0].upper()}{broken['problem'][1:]}. {why}"
    where = f"step {broken['step']}, {phase}" if broken["step"] else phase
    return Finding("broken", what, where, measured, "bytes", line)


def _beyond(memory: Rows) -> Iterator[Finding]:
    """The phases that took more than their own promise and its slack."""
    for phase, row in memory.items():
        promised, measured = row.get("promised", 0), row.get("measured", 0)
        if promised and measured > promised + slack_of(promised):
            what = f"{format_bytes(measured)} measured in this phase, {format_bytes(promised)} promised."
            line = "talik train ... --memory SIZE  # SIZE smaller by that much"
            yield Finding("beyond-promise", what, phase, measured - promised, "bytes", line)
