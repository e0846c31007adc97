"""Explains the memory of a run: planned and measured peaks, and why it ran out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from talik.base.errors import RunError
from talik.base.files import format_bytes, quoted, read_json
from talik.diagnose.findings import Finding
from talik.plan.target import slack_of

BROKEN = "broken.json"


def explain_run(folder: Path) -> list[Finding]:
    """The findings about the memory of a run that ended or ran out of memory.

    Raises:
        RunError: The folder is not a run, or the run has not ended.
    """
    if (folder / BROKEN).is_file():
        return [_broken(folder, read_json(folder / BROKEN))]
    if not (folder / "results.json").is_file():
        raise RunError(
            "has neither ended nor run out of memory",
            where=folder,
            remedy=f"Go on: talik resume {quoted(folder)}",
        )
    return list(_exceeded(read_json(folder / "results.json")["memory"]))


def _broken(folder: Path, broken: dict[str, Any]) -> Finding:
    phase, rows = broken["phase"], broken["memory"]
    promised = rows.get(phase, {}).get("promised", 0)
    had = rows.get(phase, {}).get("measured", 0)
    if promised and had <= promised + slack_of(promised):
        why = "The run stayed within its plan: another program, or a limit, took the memory."
        line = f"talik resume {quoted(folder)}  # once {format_bytes(promised + slack_of(promised))} are free"
    else:
        why = "The run took more than planned."
        line = "talik train ... --memory SIZE  # with a smaller SIZE: another way with more room is chosen"
    what = f"{broken['problem'][0].upper()}{broken['problem'][1:]}. {why}"
    where = f"step {broken['step']}, {phase}" if broken["step"] else phase
    return Finding("broken", what, where, had, "bytes", line)


def verdict(memory: dict[str, dict[str, int]]) -> str:
    """One sentence: whether a run stayed within its planned peak and the slack."""
    planned, (phase, measured) = _peaks(memory)
    if not planned:
        return f"the run had no planned memory; it took {format_bytes(measured)} ({phase})"
    kept = "kept" if measured <= planned + slack_of(planned) else "exceeded"
    sizes = f"planned {format_bytes(planned)}, measured {format_bytes(measured)} ({phase})"
    return f"the run {kept} its plan: {sizes}"


def _peaks(memory: dict[str, dict[str, int]]) -> tuple[int, tuple[str, int]]:
    """The highest planned peak, and the phase with the highest measured one."""
    measured = {phase: row.get("measured", 0) for phase, row in memory.items()}
    return max((row.get("promised", 0) for row in memory.values()), default=0), max(
        measured.items(), key=lambda item: item[1]
    )


def _exceeded(memory: dict[str, dict[str, int]]) -> Iterator[Finding]:
    """One finding if the run as a whole exceeded its plan; phases by themselves are details."""
    planned, (phase, measured) = _peaks(memory)
    if planned and measured > planned + slack_of(planned):
        what = f"{format_bytes(measured)} were measured, and {format_bytes(planned)} were planned."
        line = "talik train ... --memory SIZE  # SIZE smaller by that much"
        yield Finding("beyond-promise", what, phase, measured - planned, "bytes", line)
