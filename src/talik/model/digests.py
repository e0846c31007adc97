"""Names weights by their content: the SHA-256 of every tensor's bytes, remembered until the file changes.

As git knows an unchanged file by its size, times and number, so a file is read whole once and not again.
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from talik.files import fingerprint, read_json, write_json
from talik.model.checkpoint import Entry, pieces, read_tables
from talik.system import home_folder

RACY = 2_000_000_000  # nanoseconds: a file changed so lately may change again with the same time on it


def file_state(file: Path) -> list[int]:
    """What tells a file from the same one changed: size, times of change, number on its disk."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def tensor_digests(folder: Path) -> dict[str, str]:
    """The digest of each tensor of a model folder, by its name in the checkpoint."""
    found: dict[str, str] = {}
    for file, table in read_tables(folder).items():
        found |= _of_file(file, table)
    return found


def weights_fingerprint(folder: Path) -> str:
    """Names what weights a folder holds: every byte counts, the split into files does not."""
    return fingerprint(*(f"{name} {digest}" for name, digest in sorted(tensor_digests(folder).items())))


def _of_file(file: Path, table: dict[str, Entry]) -> dict[str, str]:
    memory = home_folder() / "digests" / f"{fingerprint(str(file.resolve()))}.json"
    state = file_state(file)
    if memory.is_file() and (known := _read(memory))["state"] == state:
        return known["tensors"]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        made = dict(zip(table, pool.map(_digest, table.values()), strict=True))
    if file_state(file) == state and state[1] < time.time_ns() - RACY:
        write_json(memory, {"file": str(file.resolve()), "state": state, "tensors": made})
    return made


def _read(memory: Path) -> dict[str, Any]:
    try:
        known = read_json(memory)
        return known if {"state", "tensors"} <= known.keys() else {"state": None}
    except ValueError:
        return {"state": None}


def _digest(entry: Entry) -> str:
    """Of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{entry.dtype} {entry.shape} ".encode())
    for piece in pieces(entry, 4 << 20):
        digest.update(piece)
    return digest.hexdigest()[:32]
