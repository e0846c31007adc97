"""The only printer. Results go to stdout, what is going on to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from talik.base.errors import TalikError
from talik.base.events import Progress as Advanced
from talik.base.events import Status
from talik.base.files import format_bytes

if TYPE_CHECKING:
    from talik.base.events import Evaluated, StepDone
    from talik.data.dataset import Data
    from talik.data.report import Report
    from talik.training.trunk.cache_folder import CacheFolder

# Counts of a report that are shown where they are not 0.
COUNTS = {
    "ends_added": "{} examples got an end token: the template writes no end of turn",
    "boundary_merged": "{} examples have a token that spans prompt and answer",
    "split_turns": "{} conversations became several examples: the template rewrites earlier answers",
    "thoughts": "{} answers keep reasoning that the template drops, or close a thought that the prompt opens",
    "quoted": "{} examples have control tokens as ordinary text",
    "developers": "{} developer messages became system messages: the template does not know the role",
    "pieces": "{} examples are pieces of documents",
}

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def result(text: Any) -> None:
    """Prints a result to stdout; a string is printed as it is."""
    out.print(Text(text) if isinstance(text, str) else text)


def piece(text: str) -> None:
    """Prints a part of an answer as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def questions() -> Iterator[str]:
    """Lines that somebody types, until an empty one or the end of the input."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def result_json(value: Any) -> None:
    """Prints a value for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def said(topic: str, text: str) -> None:
    """One line about what is going on."""
    err.print(Text.assemble((f"{topic:<9}", "bold"), text))


def failure(error: TalikError) -> None:
    """What went wrong, where, and what to do."""
    err.print(Text.assemble(("error    ", "bold red"), str(error)))


class Watch:
    """Shows the events of a run on stderr: lines, and one progress line that moves on a terminal.

    Away from a terminal the progress line becomes a line every ten seconds.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._what, self._last = "", 0.0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()

    def __call__(self, event: Any) -> None:
        kind = type(event).__name__
        if isinstance(event, Status):
            self._line(event.topic, event.text)
        elif isinstance(event, Advanced):
            self._move(
                event.what, event.done, event.total, event.text or f"{event.done:,} of {event.total:,} tokens"
            )
        elif kind == "StepDone":
            self._move("train", event.step, event.steps, step_line(event))
        elif kind == "Evaluated":
            self._line("eval", evaluated_line(event))
            for name, part in event.by_source.items():
                self._line("eval", f"  {name}: loss {part.loss:.4f}, accuracy {100 * part.accuracy:.1f} %")
        elif kind == "Saved":
            self._line("saved", str(event.path))
        elif kind == "Data":
            for line in data_lines(event):
                self._line("data", line)

    def _line(self, topic: str, text: str) -> None:
        if self._bar is None:
            said(topic, text)
        else:
            self._bar.console.print(Text.assemble((f"{topic:<9}", "bold"), text))

    def _move(self, what: str, done: int, total: int, text: str) -> None:
        if not err.is_terminal:
            now = time.monotonic()
            if done == total or what != self._what or now - self._last > 10:
                said(what, text)
                self._what, self._last = what, now
            return
        if self._bar is None or what != self._what:
            self._end_bar()
            columns = (TextColumn(f"[bold]{what:<8}"), BarColumn(20), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(compact=True), console=err)
            self._bar.start()
            self._task, self._what = self._bar.add_task(text, total=total or None), what
        self._bar.update(self._task, completed=done, description=text)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


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


def data_lines(data: Data) -> list[str]:
    """What was made of a file of rows, and what happened to rows that did not fit."""
    report = data.report
    lines = [
        f"{data.path}: {report.rows:,} rows for {data.use}, format {data.format}; "
        f"template: {report.template}",
        f"{report.examples:,} examples, {report.tokens:,} tokens, {report.trained_tokens:,} of them trained; "
        f"the longest has {report.longest:,}",
    ]
    for kind, counted in report.too_long.items():
        if counted.count:
            places = ", ".join(map(str, counted.places[:3])) + (", ..." if counted.count > 3 else "")
            lines.append(f"longer than --max-length: {counted.count:,} x {kind} ({places})")
    if report.dropped or report.cut:
        lines.append(f"{report.dropped:,} examples dropped, {report.cut:,} cut (--too-long)")
    if report.tails_cut:
        lines.append(
            f"{report.tails_cut:,} examples cut behind their last trained token, where nothing is lost"
        )
    lines += [text.format(f"{count:,}") for name, text in COUNTS.items() if (count := getattr(report, name))]
    if len(data.sources) > 1:
        lines += [
            f"{source.path}: {source.examples:,} examples, {source.tokens:,} tokens, "
            f"{100 * source.trained_tokens / max(1, report.trained_tokens):.1f} % of the trained ones"
            for source in data.sources
        ]
    if data.problems:
        kinds = ", ".join(f"{kind}: {count:,}" for kind, count in data.problems.items())
        lines.append(f"{sum(data.problems.values()):,} rows cannot be used and are left out ({kinds})")
    if data.media:
        lines.append(f"{data.media:,} rows with pictures, video or sound are left out (--drop-media)")
    if data.unread:
        lines.append(
            "not used: " + ", ".join(f"{name} ({count:,} rows)" for name, count in data.unread.items())
        )
    return lines


def template_lines(report: Report) -> list[str]:
    """The facts about a chat template, in words."""
    return [f"template: {line}" for line in report.facts.lines()] if report.facts else []


def answers(questions: Sequence[str], base: Sequence[str], tuned: Sequence[str]) -> Table:
    """What two models say to the same questions."""
    table = Table("question", "base", "tuned", show_lines=True)
    for row in zip(questions, base, tuned, strict=True):
        table.add_row(*map(Text, row))
    return table


def comparison(rows: Sequence[tuple[str, dict[str, float]]]) -> Table:
    """Evaluations beside each other."""
    table = Table("model", "loss per trained token", "perplexity", "token accuracy", box=None, pad_edge=False)
    for name, mark in rows:
        accuracy = f"{100 * mark['accuracy']:.1f} %"
        table.add_row(name, f"{mark['loss']:.4f}", f"{mark['perplexity']:.2f}", accuracy)
    return table


def memory(phases: dict[str, dict[str, int]]) -> Table:
    """What each phase of a run was promised, and what it took."""
    table = Table("memory of", "promised", "measured", "", box=None, pad_edge=False)
    for phase, row in phases.items():
        promised, measured = row.get("promised", 0), row.get("measured", 0)
        off = f"{100 * (measured / promised - 1):+.1f} %" if promised else ""
        table.add_row(phase, format_bytes(promised) if promised else "-", format_bytes(measured), off)
    return table


def caches(root: Path, folders: Sequence[CacheFolder], as_json: bool) -> None:
    """The trunk's caches, least recently used first, and what they take together."""
    total = sum(folder.size for folder in folders)
    if as_json:
        result_json({"folder": str(root), "bytes": total, "caches": [_cache_fields(f) for f in folders]})
        return
    rows = [("key", "model", "tokens", "size", "last used", "state")]
    for folder in folders:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.used))
        cells = (
            folder.key[:12],
            folder.model,
            f"{folder.tokens:,}",
            format_bytes(folder.size),
            used,
            folder.state,
        )
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if folders else ():  # no Table: it would cut names off where nobody has a terminal
        result("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    result(f"{len(folders)} caches, {format_bytes(total)}, in {root}")


def cleared(root: Path, done: Sequence[tuple[CacheFolder, bool]], as_json: bool) -> None:
    """Which caches were removed and which were left, and the bytes that were freed."""
    freed = sum(folder.size for folder, removed in done if removed)
    if as_json:
        rows = [{**_cache_fields(folder), "removed": removed} for folder, removed in done]
        result_json({"folder": str(root), "freed": freed, "caches": rows})
        return
    for folder, removed in done:
        what = "removed" if removed else "left, another process uses it right now"
        result(f"{folder.key[:12]}  {folder.model}  {format_bytes(folder.size)}: {what}")
    result(f"{format_bytes(freed)} ({freed:,} bytes) freed in {root}")


def _cache_fields(folder: CacheFolder) -> dict[str, Any]:
    return {**asdict(folder), "path": str(folder.path)}
