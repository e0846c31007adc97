"""Hashes of weights: the SHA-256 of every tensor, remembered until the file changes.

An unchanged file is recognised by size, times and inode number, as in git, so it is read only once.
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from talik.base.files import fingerprint, read_json, write_json
from talik.base.system import home_folder
from talik.model.weights.safetensors_file import Entry, pieces, read_tables, weight_files

RACY = 2_000_000_000  # nanoseconds: a file changed this recently may change again with the same time stamp


def file_state(file: Path) -> list[int]:
    """Identifies the state of a file: size, modification and change time, inode number."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def tensor_digests(folder: Path) -> dict[str, str]:
    """The hash of each tensor of a model folder, by its name in the checkpoint."""
    found: dict[str, str] = {}
    for file, table in read_tables(folder).items():
        found |= _of_file(file, table)
    return found


def weights_fingerprint(folder: Path) -> str:
    """A hash of all weights of a folder; independent of their split into files."""
    return fingerprint(*(f"{name} {digest}" for name, digest in sorted(tensor_digests(folder).items())))


def remembered(folder: Path) -> bool:
    """True if the hashes are known without reading the files."""
    return all(_known(file)["state"] == file_state(file) for file in weight_files(folder))


def _of_file(file: Path, table: dict[str, Entry]) -> dict[str, str]:
    state, known = file_state(file), _known(file)
    if known["state"] == state:
        return known["tensors"]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        made = dict(zip(table, pool.map(_digest, table.values()), strict=True))
    if file_state(file) == state and state[1] < time.time_ns() - RACY:
        write_json(_memory(file), {"file": str(file.resolve()), "state": state, "tensors": made})
    return made


def _memory(file: Path) -> Path:
    return home_folder() / "digests" / f"{fingerprint(str(file.resolve()))}.json"


def _known(file: Path) -> dict[str, Any]:
    """The remembered hashes of a file, and its state; None if there are none."""
    try:
        known = read_json(_memory(file))
        return known if {"state", "tensors"} <= known.keys() else {"state": None}
    except (FileNotFoundError, ValueError):
        return {"state": None}


def _digest(entry: Entry) -> str:
    """Hashes dtype, shape and bytes."""
    digest = hashlib.sha256(f"{entry.dtype} {entry.shape} ".encode())
    for piece in pieces(entry, 4 << 20):
        digest.update(piece)
    return digest.hexdigest()[:32]
