"""Tables: answers, evaluations, the memory of a run, caches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from talik.base.files import format_bytes
from talik.cli.show.console import result, result_json
from talik.training.trunk.cache_folder import CacheFolder


def answers(questions: Sequence[str], base: Sequence[str], tuned: Sequence[str]) -> Table:
    """The answers of two models to the same questions."""
    table = Table("question", "base", "tuned", show_lines=True)
    for row in zip(questions, base, tuned, strict=True):
        table.add_row(*map(Text, row))
    return table


def comparison(rows: Sequence[tuple[str, dict[str, float]]]) -> Table:
    """Evaluations, one per row."""
    table = Table("model", "loss per trained token", "perplexity", "token accuracy", box=None, pad_edge=False)
    for name, mark in rows:
        accuracy = f"{100 * mark['accuracy']:.1f} %"
        table.add_row(name, f"{mark['loss']:.4f}", f"{mark['perplexity']:.2f}", accuracy)
    return table


def memory(phases: Mapping[str, Mapping[str, int]]) -> Table:
    """The planned and the measured memory of each phase."""
    table = Table("memory of", "promised", "measured", "", box=None, pad_edge=False)
    for phase, row in phases.items():
        promised, measured = row.get("promised", 0), row.get("measured", 0)
        off = f"{100 * (measured / promised - 1):+.1f} %" if promised else ""
        table.add_row(phase, format_bytes(promised) if promised else "-", format_bytes(measured), off)
    return table


def caches(root: Path, folders: Sequence[CacheFolder], as_json: bool) -> None:
    """Prints the caches, least recently used first, and their total size."""
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
    for row in rows if folders else ():  # not a Table, which cuts names off without a terminal
        result("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    result(f"{len(folders)} caches, {format_bytes(total)}, in {root}")


def cleared(root: Path, done: Sequence[tuple[CacheFolder, bool]], as_json: bool) -> None:
    """Prints which caches were deleted and the bytes that were freed."""
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
