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
        raise RunError("the run has not ended", where=folder, remedy=f"Go on: talik resume {quoted(folder)}")
    return list(_beyond(read_json(folder / "results.json")["memory"]))


def _broken(folder: Path, broken: dict[str, Any]) -> Finding:
    phase, rows = broken["phase"], broken["memory"]
    promised = rows.get(phase, {}).get("promised", 0)
    measured = rows.get(phase, {}).get("measured", 0)
    if promised and measured <= promised + slack_of(promised):
        why = "The run kept its promise: something else on this machine, or a limit, took the memory."
        line = f"talik resume {quoted(folder)}  # once {format_bytes(promised + slack_of(promised))} are free"
    else:
        why = "The run took more than it was promised."
        line = "talik train ... --memory SIZE  # with a smaller SIZE: another way is chosen, with more room"
    what = f"{broken['problem'][0].upper()}{broken['problem'][1:]}. {why}"
    where = f"step {broken['step']}, {phase}" if broken["step"] else phase
    return Finding("broken", what, where, measured, "bytes", line)


def _beyond(memory: dict[str, dict[str, int]]) -> Iterator[Finding]:
    for phase, row in memory.items():
        promised, measured = row.get("promised", 0), row.get("measured", 0)
        if promised and measured > promised + slack_of(promised):
            what = f"{format_bytes(measured)} were measured, and {format_bytes(promised)} promised."
            line = "talik train ... --memory SIZE  # SIZE smaller by that much"
            yield Finding("beyond-promise", what, phase, measured - promised, "bytes", line)
