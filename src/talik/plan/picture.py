"""Draws the memory of a simulated run by cause, from the first storage to the last."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talik.base.errors import UsageError
from talik.base.files import atomic
from talik.simulate.account import Simulation, allocated_by_cause, levels
from talik.simulate.storage_log import CAUSES, StorageLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = (".svg", ".png")
POINTS = 300  # points of the x axis; the highest event between two of them is shown
NARROW = 0.02  # share of the x axis that the name of a phase needs; shorter phases have none,
TOGETHER = frozenset({"forward", "loss", "backward"})  # but these alternate and are named together
# Permanent memory is blue and green, temporary memory warm; also distinct for most kinds of colour blindness.
COLOURS = {  # of CAUSES
    "program": "#9aa0a6",
    "weights frozen": "#a6cbe8",
    "weights trained": "#2f6db3",
    "gradients": "#7b4fa6",
    "optimizer state": "#2a9d77",
    "cache and batches": "#b9dd7c",
    "saved activations": "#f2a541",
    "recomputed": "#f7d774",
    "logits and loss": "#d1495b",
    "workspace": "#5b3a29",
    "libraries": "#c98bb9",
    "allocator": "#d8d8d8",
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "talik",  # deterministic file
    "font.size": 9,
}


def write_picture(simulation: Simulation, file: Path, *, budget: int, program: int = 0) -> None:
    """Draws the allocated bytes of a simulated run, stacked by cause, as .svg or .png.

    The x axis counts allocations and releases in order, until the last allocation, with the phases named. A
    line shows the `budget` in bytes; `program` bytes lie under everything. Long runs are thinned out so that
    every peak stays.

    Raises:
        UsageError: The suffix is another one, or matplotlib is not installed.
    """
    kind = picture_kind(file)
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = 'Install it: pip install "talik[picture]"'
        raise UsageError("a picture needs matplotlib, which is not installed", remedy=remedy) from error
    with rc_context(SETTINGS), atomic(file) as out:
        figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
        _draw(figure.add_subplot(), simulation.log, budget, program)
        figure.savefig(out, format=kind[1:], metadata={"Date": None} if kind == ".svg" else None)


def picture_kind(file: Path) -> str:
    """The suffix of a picture in lower case; raises UsageError for an unknown one."""
    kind = file.suffix.lower()
    if kind not in KINDS:
        problem = f"a picture cannot be a {kind or 'file without suffix'}"
        raise UsageError(problem, where=file, remedy="Name a file that ends in .svg or .png.")
    return kind


def _draw(axes: Axes, log: StorageLog, budget: int, program: int) -> None:
    numbers, stacked = thinned(log, program)
    numbers, stacked = (
        [*numbers, _length(log)],
        [*stacked, stacked[-1]],
    )  # the last phase has a width too
    unit, word = _unit(max(budget, *(sum(causes.values()) for causes in stacked)))
    present = [cause for cause in CAUSES if any(causes.get(cause) for causes in stacked)]
    heights = [[causes.get(cause, 0) / unit for causes in stacked] for cause in present]
    colours = [COLOURS[cause] for cause in present]
    axes.stackplot(numbers, heights, labels=present, colors=colours, step="post", linewidth=0)
    axes.axhline(budget / unit, color="black", linestyle="--", linewidth=1.2, label="budget")
    axes.set_xlim(0, _length(log))
    axes.set_ylim(0)
    axes.set_ylabel(f"memory ({word})")
    axes.set_xlabel("allocations and releases")
    _name_phases(axes, log)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def thinned(log: StorageLog, program: int = 0) -> tuple[list[int], list[dict[str, int]]]:
    """At most POINTS numbers of events, and the bytes by cause after each of them.

    The events are divided into as many ranges as there are points; each range is represented by its highest
    event.
    """
    totals = [total for _, _, total in levels(log)][: _length(log)]
    size = max(1, -(-len(totals) // POINTS))
    ranges = [range(start, min(start + size, len(totals))) for start in range(0, len(totals), size)]
    chosen = [max(numbers, key=lambda number: totals[number]) for numbers in ranges]
    wanted = set(chosen)
    allocated = enumerate(allocated_by_cause(log.changes(), {"program": program}))
    stacked = [dict(causes) for number, causes in allocated if number in wanted]
    return chosen, stacked


def phases_of(log: StorageLog) -> list[tuple[int, int, str]]:
    """Start and end of phases as numbers of events; short micro-batches are merged."""
    marks, least = [*log.marks, (_length(log), "")], NARROW * _length(log)
    found: list[tuple[int, int, list[str], int]] = []
    for (start, name), (end, _) in pairwise(marks):
        if start >= end:
            continue
        short = (
            found and max(end - start, found[-1][3]) < least and TOGETHER.issuperset([name, *found[-1][2]])
        )
        if found and (short or found[-1][2] == [name]):
            first, _, names, longest = found.pop()
            found.append((first, end, list(dict.fromkeys([*names, name])), max(longest, end - start)))
        else:
            found.append((start, end, [name], end - start))
    return [(start, end, ", ".join(names)) for start, end, names, _ in found]


def _name_phases(axes: Axes, log: StorageLog) -> None:
    """Draws lines at the start of phases and their names, upright if there is little room."""
    for start, end, name in phases_of(log):
        axes.axvline(start, color="black", linewidth=0.4, alpha=0.5)
        share = (end - start) / _length(log)
        if share >= NARROW:
            axes.text(
                (start + end) / 2,
                1.01,
                name,
                transform=axes.get_xaxis_transform(),
                rotation=0 if share > 0.01 * (len(name) + 1) else 90,
                ha="center",
                va="bottom",
                fontsize=8,
            )


def _length(log: StorageLog) -> int:
    """Events until the last birth; later ones belong to the end of the simulation."""
    return max((number + 1 for number, event in enumerate(log.events) if event >= 0), default=0)


def _unit(largest: int) -> tuple[int, str]:
    return (1 << 30, "GiB") if largest >= 1 << 30 else (1 << 20, "MiB")
