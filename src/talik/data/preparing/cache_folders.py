"""Manages the cache folders of prepared examples in Talik's home folder.

ROOT/KEY/data.json      everything the examples depend on; KEY is its fingerprint; its mtime is the last use
ROOT/KEY/part-*         the examples (`parts`)
ROOT/KEY/whole.json     the number of parts; written when all parts are complete
ROOT/KEY.lock           held by the process that writes the folder
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from talik.base.events import Notify, Status
from talik.base.files import fingerprint, read_json, write_json
from talik.base.system import home_folder
from talik.data.reading.streams import DataFile

_KEY = re.compile("[0-9a-f]{32}")


def data_root() -> Path:
    """Returns the folder of all caches of prepared examples."""
    return home_folder() / "data"


def state_of(file: DataFile) -> list[Any]:
    """Returns the absolute path of a file, its size in bytes, and its modification time in nanoseconds."""
    path = file.path.absolute()
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]


@contextmanager
def locked_folder(facts: dict[str, Any], states: Sequence[list[Any]], notify: Notify) -> Generator[Path]:
    """Locks the cache folder for these facts and files, and yields it.

    Folders whose data files have changed are removed, because their key will not occur again.

    Args:
        facts: Everything but the files that the examples depend on, as JSON values.
        states: The state of each data file (`state_of`).
        notify: Gets events about waiting and about removed folders.
    """
    root, known = data_root(), {"facts": json.loads(json.dumps(facts)), "files": list(states)}
    folder = root / _key_of(known)
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notify(Status("data", f"another process is preparing the same data in {folder}: waiting for it"))
        lock.acquire()
    try:
        for gone in remove_outdated(root):
            notify(Status("data", f"{gone} was removed: it was prepared from files that have changed"))
        folder.mkdir(exist_ok=True)
        if not (folder / "data.json").is_file():
            write_json(folder / "data.json", known)
        with suppress(OSError):
            os.utime(folder / "data.json")
        yield folder
    finally:
        lock.release()


def remove_outdated(root: Path) -> list[Path]:
    """Removes and returns the folders whose data files have changed, except those that are locked."""
    found = [path for path in sorted(root.iterdir()) if _KEY.fullmatch(path.name) and _is_outdated(path)]
    return [path for path in found if _removed(path)]


def _is_outdated(folder: Path) -> bool:
    """True if this is a cache folder, and one of its data files exists in another state."""
    try:
        known = read_json(folder / "data.json")
        if _key_of(known) != folder.name:
            return False
        states = [(Path(path), [size, changed]) for path, size, changed in known["files"]]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return any(path.is_file() and _now(path) != state for path, state in states)


def _now(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _removed(folder: Path) -> bool:
    """Removes a folder; False if another process uses it."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    gone = folder.with_name(f".{folder.name}.gone")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)  # atomic: no process finds half of it
        shutil.rmtree(gone, ignore_errors=True)
    except OSError:  # Windows: another process has one of its files open
        return False
    finally:
        lock.release()
    return True


def _key_of(known: dict[str, Any]) -> str:
    return fingerprint(json.dumps([known["facts"], known["files"]], sort_keys=True))
