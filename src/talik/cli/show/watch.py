"""The events of a run on stderr: lines of text, and one progress line."""

from __future__ import annotations

import time
from functools import singledispatch
from typing import Any

from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from talik.base.events import Evaluated, Progress, Saved, Status, StepDone
from talik.base.files import format_bytes
from talik.cli.show.console import err, said
from talik.cli.show.data import data_lines
from talik.data.dataset import Data

SECONDS = 10  # between two progress lines where stderr is not a terminal


class Watch:
    """Shows the events of a run on stderr: lines, and one progress line that moves on a terminal.

    Where stderr is not a terminal, progress is written as a line every ten seconds.
    """

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None
        self._task = TaskID(0)
        self._what, self._last = "", 0.0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()

    def __call__(self, event: Any) -> None:
        if isinstance(event, StepDone):
            self._move(Progress("train", event.step, event.steps, step_line(event)))
        elif isinstance(event, Progress):
            self._move(event)
        else:
            for topic, text in lines_of(event):
                self._line(topic, text)

    def _line(self, topic: str, text: str) -> None:
        if self._bar is None:
            said(topic, text)
        else:
            self._bar.console.print(Text.assemble((f"{topic:<9}", "bold"), text))

    def _move(self, progress: Progress) -> None:
        text = progress.text or f"{progress.done:,} of {progress.total:,} tokens"
        if not err.is_terminal:
            self._move_without_terminal(progress, text)
            return
        if self._bar is None or progress.what != self._what:
            self._end_bar()
            columns = (
                TextColumn(f"[bold]{progress.what:<8}"),
                BarColumn(20),
                TextColumn("{task.description}"),
            )
            self._bar = ProgressBar(*columns, TimeRemainingColumn(compact=True), console=err)
            self._bar.start()
            self._task, self._what = self._bar.add_task(text, total=progress.total or None), progress.what
        self._bar.update(self._task, completed=progress.done, description=text)

    def _move_without_terminal(self, progress: Progress, text: str) -> None:
        now = time.monotonic()
        ended, new = progress.done == progress.total, progress.what != self._what
        if ended or new or now - self._last > SECONDS:
            said(progress.what, text)
            self._what, self._last = progress.what, now

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@singledispatch
def lines_of(event: Any) -> list[tuple[str, str]]:
    """The lines of an event, each with its topic; none for an event that is not shown."""
    return []


@lines_of.register
def _(event: Status) -> list[tuple[str, str]]:
    return [(event.topic, event.text)]


@lines_of.register
def _(event: Evaluated) -> list[tuple[str, str]]:
    parts = (
        f"  {name}: loss {part.loss:.4f}, accuracy {100 * part.accuracy:.1f} %"
        for name, part in event.by_source.items()
    )
    return [("eval", line) for line in (evaluated_line(event), *parts)]


@lines_of.register
def _(event: Saved) -> list[tuple[str, str]]:
    return [("saved", str(event.path))]


@lines_of.register
def _(event: Data) -> list[tuple[str, str]]:
    return [("data", line) for line in data_lines(event)]


def step_line(done: StepDone) -> str:
    """A step in one line."""
    return (
        f"step {done.step}/{done.steps}  loss {done.loss:.4f}  {done.tokens / done.seconds:,.0f} tokens/s  "
        f"memory {format_bytes(done.peak_memory_bytes)}"
    )


def evaluated_line(event: Evaluated) -> str:
    """An evaluation in one line."""
    mark = event.evaluation
    what = "base model" if event.step == 0 else f"step {event.step}"
    best = ", the best so far" if event.best and event.step else ""
    return f"{what}: loss {mark.loss:.4f} per trained token, accuracy {100 * mark.accuracy:.1f} %{best}"
