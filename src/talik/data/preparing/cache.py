"""Prepared examples in files: found again by later runs, and gone on with where a start was broken off."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from talik.base.errors import DataError
from talik.base.events import Notify, Progress, Status
from talik.base.files import atomic, fingerprint, read_json, write_json
from talik.base.system import release_free_memory
from talik.data.preparing.cache_folders import held_folder, state_of
from talik.data.preparing.parts import Damaged, joined, read_part, write_part
from talik.data.preparing.prepare import (
    Chunk,
    FileOptions,
    Outcome,
    PrepareOptions,
    Rejected,
    chunks,
    prepare_all,
)
from talik.data.preparing.workers import worker_count
from talik.data.reading.rows import Place, Problem
from talik.data.report import Counted, Report
from talik.data.templates.template_facts import Facts

PART_BYTES = 32 << 20  # bytes of token ids, or of rejected rows, of a part
VERSION = 2  # of how examples are made and kept: others are not found again


class Told:
    """Tells once a second how many rows are prepared, and how fast.

    Args:
        size: Bytes of all files; 0 where that says nothing about how far it has come.
        notify: Who is told.
        done: Bytes that were prepared before.
    """

    def __init__(self, size: int, notify: Notify, done: int = 0) -> None:
        self._size, self._done, self._notify = size, done, notify
        self._rows, self._start = 0, time.monotonic()
        self._last = self._start

    def __call__(self, chunk: Chunk, outcome: Outcome) -> None:
        self._rows += outcome.rows
        self._done += chunk.size
        now = time.monotonic()
        if now - self._last > 1:
            rate, total = self._rows / (now - self._start), self._size if chunk.size else 0
            share = f"{100 * self._done / total:.0f} % of the data, " if total else ""
            text = f"{share}{self._rows:,} rows, {rate:,.0f} rows/s, {chunk.of.file.name}"
            self._notify(Progress("data", min(self._done, total) if total else self._rows, total, text))
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
    facts = {
        "version": VERSION,
        "kept": [item.name for kind in (Report, Facts) for item in fields(kind)],
        "options": asdict(options),
        "tokenizer": tokenizer_state(tokenizer),
        "read": [[of.form, *asdict(of.rows).values(), of.limit] for of in files],
    }
    states = [state_of(of.file) for of in files]
    with held_folder(facts, states, notify) as folder:
        whole, done = _known(folder, files, notify)
        if (folder / "whole.json").is_file():
            notify(Status("data", f"prepared before: {whole.rows:,} rows in {folder}"))
            return whole
        if done:
            notify(Status("data", f"goes on after {whole.rows:,} rows that are prepared in {folder}"))
        work = work_of(files)
        told = Told(size, notify, sum(next(work).size for _ in range(done)))
        release_free_memory()  # reading a tokenizer leaves much, in each worker at the same time
        made = prepare_all(work, tokenizer, options, load, worker_count())
        _write_parts(folder, files, made, whole, told)
        for of, state in zip(files, states, strict=True):
            if state_of(of.file) != state:
                raise DataError("has changed while it was read", where=of.file.name, remedy="Run it again.")
        write_json(folder / "whole.json", {"parts": len(whole.parts)})
    return whole


def work_of(files: Sequence[FileOptions]) -> Iterator[Chunk]:
    """The chunks of all files, in order."""
    return (chunk for of in files for chunk in chunks(of))


def tokenizer_state(tokenizer: Any) -> str:
    """Names a tokenizer and its template: the same for the same ids."""
    backend = (
        tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else repr(tokenizer)
    )
    return fingerprint(backend, repr(tokenizer.chat_template), repr(tokenizer.special_tokens_map))


def _write_parts(
    folder: Path,
    files: Sequence[FileOptions],
    made: Iterator[tuple[Chunk, Outcome]],
    whole: Outcome,
    told: Told,
) -> None:
    """Writes outcomes, some at a time; those that are there when Ctrl-C comes are written as well."""
    held, count, size = Outcome(), 0, 0
    try:
        for chunk, outcome in made:
            held.add(outcome)
            count += 1
            size += sum(part.ids.nbytes for part in outcome.parts) + sum(map(len, outcome.rejected.lines))
            told(chunk, outcome)
            if size >= PART_BYTES:
                _write_part(folder, files, held, count, whole)
                held, count, size = Outcome(), 0, 0
    finally:
        if count:
            _write_part(folder, files, held, count, whole)


def _write_part(
    folder: Path, files: Sequence[FileOptions], held: Outcome, count: int, whole: Outcome
) -> None:
    file = folder / f"part-{len(whole.parts):05d}"
    rejected = file.with_suffix(".rejected.jsonl")
    if held.rejected.lines:
        with atomic(rejected) as stream:
            stream.writelines(line.encode("utf-8", "backslashreplace") for line in held.rejected.lines)
        held.rejected = Rejected(files=[rejected])
    write_part(joined(held.parts), file, {"chunks": count, **_about(held, files)})
    held.parts = [read_part(file, verify=False)[0]]
    whole.add(held)
    release_free_memory()


def _known(folder: Path, files: Sequence[FileOptions], notify: Notify) -> tuple[Outcome, int]:
    """The results that are kept, and how many chunks they are of; nothing stays from a damaged part on."""
    whole, done = Outcome(), 0
    for broken_off in folder.glob(".part-*"):
        broken_off.unlink()
    names = sorted({path.name.split(".")[0] for path in folder.glob("part-*")})
    for number, name in enumerate(names):
        file = folder / name
        try:
            if name != f"part-{number:05d}":
                raise Damaged("comes after one that is missing")
            part, about = read_part(file)
            outcome = _outcome_of(about, files)
            outcome.parts, outcome.rejected = [part], _rejected_of(file)
            whole.add(outcome)
            done += about["chunks"]
        except (Damaged, LookupError, TypeError, ValueError) as error:
            if file.with_suffix(".json").is_file():  # else it was broken off
                notify(Status("data", f"{file} {error}: it is prepared again, with all that follows"))
            _remove(folder, names[number:])
            break
    with suppress(OSError, ValueError, LookupError, TypeError):
        if read_json(folder / "whole.json")["parts"] == len(whole.parts):
            return whole, done
    (folder / "whole.json").unlink(missing_ok=True)
    return whole, done


def _remove(folder: Path, names: Sequence[str]) -> None:
    (folder / "whole.json").unlink(missing_ok=True)
    for path in sorted(folder.glob("*"), reverse=True):  # tables before their arrays
        if path.name.split(".")[0] in names:
            path.unlink()


def _rejected_of(file: Path) -> Rejected:
    rejected = file.with_suffix(".rejected.jsonl")
    return Rejected(files=[rejected] if rejected.is_file() else [])


def _about(outcome: Outcome, files: Sequence[FileOptions]) -> dict[str, Any]:
    """The counts of an outcome as JSON; a file is its number."""
    report = outcome.report
    assert report is not None
    numbers = {of.file.name: of.number for of in files}

    def place(of: Place) -> list[Any]:
        return [numbers[of.file], of.line, of.unit]

    return {
        "report": {name: getattr(report, name) for name in Report.counts()},
        "template": report.template,
        "facts": asdict(report.facts) if report.facts else None,
        "too_long": {kind: [c.count, [place(p) for p in c.places]] for kind, c in report.too_long.items()},
        "problems": [[place(p.place), p.kind, p.text, p.field] for p in outcome.problems],
        "kinds": outcome.kinds,
        "over": [[place(at), text] for at, text in outcome.over],
        "unread": outcome.unread,
        "rows": outcome.rows,
    }


def _outcome_of(about: dict[str, Any], files: Sequence[FileOptions]) -> Outcome:
    """The counts that `_about` wrote."""

    def place(written: Sequence[Any]) -> Place:
        number, line, unit = written
        return Place(files[number].file.name, line, unit)

    facts, counts = about["facts"], dict(about["report"])
    values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in (facts or {}).items()}
    known = Facts(**values) if facts else None
    report = Report(counts.pop("rows"), about["template"], known, **counts)
    for kind, (count, places) in about["too_long"].items():
        report.too_long[kind] = Counted(count, [place(p) for p in places])
    return Outcome(
        report=report,
        problems=[Problem(place(at), *rest) for at, *rest in about["problems"]],
        kinds=Counter(about["kinds"]),
        over=[(place(at), text) for at, text in about["over"]],
        unread=Counter(about["unread"]),
        rows=about["rows"],
    )
