"""The folders of prepared examples in Talik's home, each named by what its examples depend on.

ROOT/KEY/data.json      the facts that KEY is the fingerprint of; its time is the last use
ROOT/KEY/part-*         examples (`parts`)
ROOT/KEY/whole.json     how many parts there are; written when all of them are
ROOT/KEY.lock           held by the process that writes there
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
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
    """The folder of all prepared examples."""
    return home_folder() / "data"


def state_of(file: DataFile) -> list[Any]:
    """The whole path of a file, its size, and when it was last changed, in nanoseconds."""
    path = file.path.absolute()
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]


@contextmanager
def held_folder(facts: dict[str, Any], states: Sequence[list[Any]], notify: Notify) -> Iterator[Path]:
    """The folder for these facts and files, which no other process writes meanwhile.

    Folders whose files have changed since are removed: nobody finds them again.
    """
    root, known = data_root(), {"facts": json.loads(json.dumps(facts)), "files": list(states)}
    folder = root / _key_of(known)
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notify(Status("data", f"another process prepares the same data in {folder}: waiting for it"))
        lock.acquire()
    try:
        for gone in remove_outdated(root):
            notify(Status("data", f"{gone} was prepared from files that have changed, and is removed"))
        folder.mkdir(exist_ok=True)
        if not (folder / "data.json").is_file():
            write_json(folder / "data.json", known)
        with suppress(OSError):
            os.utime(folder / "data.json")
        yield folder
    finally:
        lock.release()


def remove_outdated(root: Path) -> list[Path]:
    """Removes the folders whose data files have changed, unless another process writes them."""
    found = [path for path in sorted(root.iterdir()) if _KEY.fullmatch(path.name) and _is_outdated(path)]
    return [path for path in found if _removed(path)]


def _is_outdated(folder: Path) -> bool:
    """Whether it is a folder of ours of which some file is there in another state."""
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
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    gone = folder.with_name(f".{folder.name}.gone")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)  # at once: nobody finds half of it
        shutil.rmtree(gone, ignore_errors=True)
    except OSError:  # Windows: somebody has one of its files open
        return False
    finally:
        lock.release()
    return True


def _key_of(known: dict[str, Any]) -> str:
    return fingerprint(json.dumps([known["facts"], known["files"]], sort_keys=True))
