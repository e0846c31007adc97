"""Keeps prepared examples in files: later runs find them, and an interrupted preparation continues."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from talik.base.errors import DataError
from talik.base.events import Notify, Progress, Status
from talik.base.files import atomic, fingerprint, read_json, write_json
from talik.base.system import release_free_memory
from talik.data.preparing.cache_folders import locked_folder, state_of
from talik.data.preparing.parts import PartDamagedError, joined, read_part, write_part
from talik.data.preparing.prepare import (
    Chunk,
    InputFile,
    Outcome,
    PrepareOptions,
    Rejected,
    chunks_of_all,
    prepare_all,
)
from talik.data.preparing.workers import worker_count
from talik.data.reading.rows import Place, Problem, is_list
from talik.data.report import Counted, Report
from talik.data.templates.template_facts import TemplateFacts

PART_BYTES = 32 << 20  # bytes of token ids and rejected rows in a part
VERSION = 2  # raised when examples are made or stored in another way; caches of other versions are not used


class PreparationProgress:
    """Reports once a second how many rows are prepared, and how fast.

    Args:
        size: The number of bytes of all files; 0 if it is not known.
        notify: Gets the events.
        done: The number of bytes that were prepared before.
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
            text = f"{share}{self._rows:,} rows, {rate:,.0f} rows/s, {chunk.input.file.name}"
            self._notify(Progress("data", min(self._done, total) if total else self._rows, total, text))
            self._last = now


def prepare_cached(
    files: Sequence[InputFile],
    tokenizer: Any,
    options: PrepareOptions,
    load: Callable[[], Any],
    size: int,
    notify: Notify,
) -> Outcome:
    """Prepares examples in the cache; continues an interrupted preparation.

    Args:
        files: The data files.
        tokenizer: The tokenizer for this process.
        options: The options that examples depend on.
        load: Loads the tokenizer in a worker process.
        size: The number of bytes of all files.
        notify: Gets events about the progress.

    Raises:
        DataError: A file has changed while it was read.
    """
    facts: dict[str, Any] = {
        "version": VERSION,
        "kept": [item.name for kind in (Report, TemplateFacts) for item in fields(kind)],
        "options": asdict(options),
        "tokenizer": tokenizer_state(tokenizer),
        "read": [[each.format, *asdict(each.options).values(), each.limit] for each in files],
    }
    states = [state_of(each.file) for each in files]
    with locked_folder(facts, states, notify) as folder:
        whole, done = _read_complete_parts(folder, files, notify)
        if (folder / "whole.json").is_file():
            notify(Status("data", f"prepared before: {whole.rows:,} rows in {folder}"))
            return whole
        if done:
            notify(Status("data", f"continues after {whole.rows:,} rows that are prepared in {folder}"))
        work = chunks_of_all(files)
        progress = PreparationProgress(size, notify, sum(next(work).size for _ in range(done)))
        release_free_memory()  # loading a tokenizer leaves much of it; the workers load one, too
        made = prepare_all(work, tokenizer, options, load, worker_count())
        _write_parts(folder, files, made, whole, progress)
        _check_unchanged(files, states)
        write_json(folder / "whole.json", {"parts": len(whole.parts)})
    return whole


def _check_unchanged(files: Sequence[InputFile], states: Sequence[list[Any]]) -> None:
    for each, state in zip(files, states, strict=True):
        if state_of(each.file) != state:
            problem, remedy = "the file has changed while it was read", "Run the command again."
            raise DataError(problem, where=each.file.name, remedy=remedy)


def tokenizer_state(tokenizer: Any) -> str:
    """Returns a fingerprint of a tokenizer and its template: equal for tokenizers that give equal ids."""
    backend = (
        tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else repr(tokenizer)
    )
    return fingerprint(backend, repr(tokenizer.chat_template), repr(tokenizer.special_tokens_map))


def _write_parts(
    folder: Path,
    files: Sequence[InputFile],
    made: Iterator[tuple[Chunk, Outcome]],
    whole: Outcome,
    progress: PreparationProgress,
) -> None:
    """Writes outcomes as parts of about PART_BYTES; after Ctrl-C, too, those that are finished.

    Args:
        folder: The cache folder.
        files: The data files.
        made: The chunks with their outcomes.
        whole: Gets the outcomes, with the parts memory-mapped.
        progress: Gets each chunk and its outcome.
    """
    held, count, size = Outcome(), 0, 0
    try:
        for chunk, outcome in made:
            held.add(outcome)
            count += 1
            size += sum(part.ids.nbytes for part in outcome.parts) + sum(map(len, outcome.rejected.lines))
            progress(chunk, outcome)
            if size >= PART_BYTES:
                _write_part(folder, files, held, count, whole)
                held, count, size = Outcome(), 0, 0
    finally:
        if count:
            _write_part(folder, files, held, count, whole)


def _write_part(folder: Path, files: Sequence[InputFile], held: Outcome, count: int, whole: Outcome) -> None:
    """Writes the outcome of `count` chunks as the next part, and adds it to `whole`."""
    file = folder / f"part-{len(whole.parts):05d}"
    rejected = file.with_suffix(".rejected.jsonl")
    if held.rejected.lines:
        with atomic(rejected) as stream:
            stream.writelines(line.encode("utf-8", "backslashreplace") for line in held.rejected.lines)
        held.rejected = Rejected(files=[rejected])
    write_part(joined(held.parts), file, {"chunks": count, **_outcome_as_dict(held, files)})
    held.parts = [read_part(file, verify=False)[0]]
    whole.add(held)
    release_free_memory()


def _read_complete_parts(folder: Path, files: Sequence[InputFile], notify: Notify) -> tuple[Outcome, int]:
    """Reads the parts up to the first damaged one; removes that and all later ones.

    Returns:
        The outcome of the parts, and the number of their chunks.
    """
    whole, done = Outcome(), 0
    for incomplete in folder.glob(".part-*"):
        incomplete.unlink()
    names = sorted({path.name.split(".")[0] for path in folder.glob("part-*")})
    for number, name in enumerate(names):
        file = folder / name
        try:
            if name != f"part-{number:05d}":
                raise PartDamagedError("follows a missing part")
            part, about = read_part(file)
            outcome = _outcome_from_dict(about, files)
            outcome.parts, outcome.rejected = [part], _rejected_of(file)
            whole.add(outcome)
            done += about["chunks"]
        except (PartDamagedError, LookupError, TypeError, ValueError) as error:
            if file.with_suffix(".json").is_file():  # otherwise its preparation was interrupted
                notify(Status("data", f"{file} {error}: it is prepared again, with all later parts"))
            _remove(folder, names[number:])
            break
    with suppress(OSError, ValueError, LookupError, TypeError):
        if read_json(folder / "whole.json")["parts"] == len(whole.parts):
            return whole, done
    (folder / "whole.json").unlink(missing_ok=True)
    return whole, done


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Removes parts by their names, and the mark that all parts are complete."""
    (folder / "whole.json").unlink(missing_ok=True)
    for path in sorted(folder.glob("*"), reverse=True):  # .json before .bin
        if path.name.split(".")[0] in names:
            path.unlink()


def _rejected_of(file: Path) -> Rejected:
    rejected = file.with_suffix(".rejected.jsonl")
    return Rejected(files=[rejected] if rejected.is_file() else [])


def _outcome_as_dict(outcome: Outcome, files: Sequence[InputFile]) -> dict[str, Any]:
    """Returns the counts of an outcome as JSON values; a file is its number."""
    report = outcome.report
    assert report is not None
    numbers = {each.file.name: each.number for each in files}

    def place(at: Place) -> list[Any]:
        return [numbers[at.file], at.line, at.unit]

    return {
        "report": {name: getattr(report, name) for name in Report.counts()},
        "template": report.template,
        "facts": asdict(report.facts) if report.facts else None,
        "too_long": {kind: [c.count, [place(p) for p in c.places]] for kind, c in report.too_long.items()},
        "problems": [[place(p.place), p.kind, p.text, p.field] for p in outcome.problems],
        "kinds": outcome.kinds,
        "over": [[place(at), text] for at, text in outcome.too_long],
        "unread": outcome.unread,
        "rows": outcome.rows,
    }


def _outcome_from_dict(about: Mapping[str, Any], files: Sequence[InputFile]) -> Outcome:
    """Reads the counts that `_outcome_as_dict` wrote."""

    def place(written: Sequence[Any]) -> Place:
        number: int = written[0]
        return Place(files[number].file.name, written[1], written[2])

    counts: dict[str, Any] = dict(about["report"])
    report = Report(counts.pop("rows"), about["template"], _facts_from_dict(about["facts"]), **counts)
    for kind, (count, places) in about["too_long"].items():
        report.too_long[kind] = Counted(count, [place(p) for p in places])
    return Outcome(
        report=report,
        problems=[Problem(place(at), *rest) for at, *rest in about["problems"]],
        kinds=Counter(about["kinds"]),
        too_long=[(place(at), text) for at, text in about["over"]],
        unread=Counter(about["unread"]),
        rows=about["rows"],
    )


def _facts_from_dict(facts: Mapping[str, Any] | None) -> TemplateFacts | None:
    if not facts:
        return None
    values: dict[str, Any] = {
        name: tuple(value) if is_list(value) else value for name, value in facts.items()
    }
    return TemplateFacts(**values)
