"""Prepared examples in files, found again by the state of data, tokenizer and options."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from talik.data.facts import Facts
from talik.data.prepare import (
    Chunk,
    FileOptions,
    Outcome,
    PrepareOptions,
    chunks,
    cores,
    prepare_all,
)
from talik.data.report import Report
from talik.data.rows import Place, Problem
from talik.data.sources import file_state
from talik.data.store import Part, joined, read_part, write_part
from talik.events import Notify, Progress, Said
from talik.files import fingerprint, finished_folder
from talik.system import give_back_memory, home_folder

PART_BYTES = 32 << 20  # bytes of token ids of a part
VERSION = "1"  # of what is prepared and how


class Told:
    """Tells how many rows are prepared."""

    def __init__(self, size: int, notify: Notify) -> None:
        self._size, self._notify = size, notify
        self._rows, self._tokens, self._start, self._last = 0, 0, time.monotonic(), time.monotonic()

    def __call__(self, chunk: Chunk, outcome: Outcome) -> None:
        self._rows += outcome.rows
        now = time.monotonic()
        if now - self._last > 1:
            rate = self._rows / (now - self._start)
            text = f"{self._rows:,} rows, {rate:,.0f} rows/s, {chunk.of.file.name}"
            self._notify(Progress("data", self._rows, 0, text))
            self._last = now


def in_files(
    files: Sequence[FileOptions],
    tokenizer: Any,
    options: PrepareOptions,
    load: Callable[[], Any],
    size: int,
    notify: Notify,
) -> Outcome:
    """Prepares into files that later runs find again, and goes on where an earlier start was broken off."""
    root = home_folder() / "data"
    states = [f"{file_state(of.file)} {of.form} {of.rows} {of.limit}" for of in files]
    forms = [item.name for kind in (Report, Facts) for item in fields(kind)]
    key = fingerprint(VERSION, *forms, repr(options), _tokenizer_state(tokenizer), *states)
    folder = root / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{key}.lock"):
        parts, done = _known(folder)
        whole = Outcome(parts=[part for part, _ in parts])
        for _, about in parts:
            whole.add(_outcome_of(about))
        if (folder / "whole.json").is_file():
            notify(Said("data", f"prepared before: {whole.rows:,} rows in {folder}"))
            return whole
        if done:
            notify(Said("data", f"goes on after {whole.rows:,} rows that are prepared in {folder}"))
        _write_parts(folder, files, (tokenizer, options, load), done, whole, Told(size, notify))
        (folder / "whole.json").write_text(json.dumps({"parts": len(whole.parts)}), encoding="utf-8")
    return whole


def _write_parts(
    folder: Path,
    files: Sequence[FileOptions],
    how: tuple[Any, PrepareOptions, Callable[[], Any]],
    done: int,
    whole: Outcome,
    told: Told,
) -> None:
    """Prepares all chunks but the first `done`, a part at a time."""
    tokenizer, options, load = how
    work = work_of(files)
    for _ in range(done):
        next(work)
    held, count, held_bytes = Outcome(), 0, 0
    for chunk, outcome in prepare_all(work, tokenizer, options, load, cores()):
        held.add(outcome)
        count += 1
        held_bytes += sum(part.ids.nbytes for part in outcome.parts)
        told(chunk, outcome)
        if held_bytes >= PART_BYTES:
            _write_part(folder, held, count, whole)
            held, count, held_bytes = Outcome(), 0, 0
    if count:
        _write_part(folder, held, count, whole)


def _write_part(folder: Path, held: Outcome, count: int, whole: Outcome) -> None:
    path = folder / f"part-{len(whole.parts):05d}"
    with finished_folder(path) as part:
        write_part(joined(held.parts), part, {"chunks": count, **_about(held)})
    held.parts = [read_part(path)[0]]
    whole.add(held)
    give_back_memory()


def _known(folder: Path) -> tuple[list[tuple[Part, dict[str, Any]]], int]:
    """The parts that are whole, and how many chunks they hold; what comes after a damaged one is removed."""
    parts: list[tuple[Part, dict[str, Any]]] = []
    for path in sorted(folder.glob("part-*")):
        try:
            if path.name != f"part-{len(parts):05d}":
                raise ValueError("a part before it is missing")
            parts.append(read_part(path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
            (folder / "whole.json").unlink(missing_ok=True)
    return parts, sum(about["chunks"] for _, about in parts)


def _about(outcome: Outcome) -> dict[str, Any]:
    """The counts of an outcome as JSON."""
    report = outcome.report
    assert report is not None
    counts = {name: getattr(report, name) for name in Report.counts()}
    too_long = {kind: counted.count for kind, counted in report.too_long.items()}
    return {
        "report": counts,
        "template": report.template,
        "too_long": too_long,
        "facts": asdict(report.facts) if report.facts else None,
        "problems": [_as_list(problem) for problem in outcome.problems],
        "kinds": outcome.kinds,
        "over": [[str(place), text] for place, text in outcome.over],
        "rejected": outcome.rejected,
        "unread": outcome.unread,
        "media": outcome.media,
        "formats": [[name, p.file, p.line, p.unit] for (_, name), p in outcome.formats.items()],
        "rows": outcome.rows,
    }


def _as_list(problem: Any) -> list[Any]:
    place = problem.place
    return [place.file, place.line, place.unit, problem.kind, problem.text, problem.field]


def _outcome_of(about: dict[str, Any]) -> Outcome:
    """The counts that `_about` wrote."""
    facts = about["facts"]
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (facts or {}).items()}
    known = Facts(**values) if facts else None
    report = Report(about["report"].pop("rows"), about["template"], known, **about["report"])
    for kind, count in about["too_long"].items():
        report.too_long[kind].count = count
    return Outcome(
        report=report,
        problems=[Problem(Place(*p[:3]), *p[3:]) for p in about["problems"]],
        kinds=Counter(about["kinds"]),
        over=[(Place(place, 0), text) for place, text in about["over"]],
        rejected=about["rejected"],
        unread=Counter(about["unread"]),
        media=about["media"],
        formats={(place[0], name): Place(*place) for name, *place in about["formats"]},
        rows=about["rows"],
    )


def _tokenizer_state(tokenizer: Any) -> str:
    """Names a tokenizer and its template: the same for the same ids."""
    backend = (
        tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else repr(tokenizer)
    )
    return fingerprint(backend, repr(tokenizer.chat_template), repr(tokenizer.special_tokens_map))


def work_of(files: Sequence[FileOptions]) -> Iterator[Chunk]:
    """The chunks of all files, in order."""
    return (chunk for of in files for chunk in chunks(of))
