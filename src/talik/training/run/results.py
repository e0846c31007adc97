"""The results of a run, as `train` and `resume` return them and results.json stores them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from talik.base.events import Evaluation
from talik.base.files import read_json
from talik.training.run.checkpoints import RunState
from talik.training.run.evaluation import evaluation_of

RESULTS = "results.json"


@dataclass(frozen=True, slots=True)
class Result:
    """The results of a run.

    Attributes:
        run: The run folder.
        steps: The number of steps.
        seconds: The time of this process, without the time before a resume.
        base: The evaluation of the base model; None without held-out data.
        tuned: The best evaluation after a step; None without held-out data.
        best_step: The step of the best evaluation.
        memory: By phase, the bytes promised, allocated (in the first steps) and measured.
        by_source: "base" and "tuned" by source of held-out data, if there are several.
    """

    run: str
    steps: int
    seconds: float
    base: Evaluation | None
    tuned: Evaluation | None
    best_step: int | None
    memory: dict[str, dict[str, int]]
    by_source: dict[str, dict[str, Evaluation]] = field(default_factory=dict[str, dict[str, Evaluation]])

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `by_source` is left out if it is empty."""
        return {name: value for name, value in asdict(self).items() if value or name != "by_source"}


def result_of(folder: Path, state: RunState, seconds: float, memory: dict[str, dict[str, int]]) -> Result:
    """The result of a run with this progress."""
    marks = state.evaluations
    base = marks[0] if marks else None
    best = min(marks[1:], key=lambda mark: mark["loss"], default=None)  # the first is of the base model
    both = {name: mark for name, mark in (("base", base), ("tuned", best)) if mark}
    sources: Iterable[str] = base.get("by_source", ()) if base else ()
    return Result(
        str(folder),
        state.step,
        seconds,
        evaluation_of(base) if base else None,
        evaluation_of(best) if best else None,
        state.best_step,
        memory,
        {s: {name: evaluation_of(mark["by_source"][s]) for name, mark in both.items()} for s in sources},
    )


def earlier_memory(folder: Path) -> dict[str, dict[str, int]] | None:
    """The memory table of an earlier process of this run, if that finished."""
    written = folder / RESULTS
    return read_json(written).get("memory") if written.exists() else None
