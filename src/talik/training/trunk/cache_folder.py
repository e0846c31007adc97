"""The folders of the trunk's caches: one for each trunk.

    ROOT/KEY/key.json           everything the hidden states depend on; KEY is its hash. Its modification time
                                is the time of the last use
    ROOT/KEY/shard-00000.bin    hidden states; shard-00000.json is its table
    ROOT/KEY.lock               the lock of the process that writes to the cache

This module does not import torch, so that listing caches is quick.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from talik.base.errors import NoRoomError, UsageError
from talik.base.files import fingerprint, read_json
from talik.base.system import home_folder

CacheState = Literal["usable", "being written", "unfinished"]
_NAME = re.compile(r"([0-9a-f]{32})|\.([0-9a-f]{32})\.(part|gone)")
_SHARD = re.compile(r"\.?shard-\d+\.(bin|json)(\.\w+)?")  # or a temporary file
_TABLE = re.compile(r"\.?key\.json(\.\w+)?")


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """One cache on the disk.

    Attributes:
        path: The folder.
        key: The hash of everything the hidden states depend on.
        state: "unfinished" if it has no valid key.json.
        model: The name of the model.
        tokens: How many tokens have hidden states.
        size: The size in bytes.
        used: The time of the last use, in seconds since 1970.
    """

    path: Path
    key: str
    state: CacheState
    model: str
    tokens: int
    size: int
    used: float


def default_root() -> Path:
    """The folder of all caches, unless the recipe names another."""
    return home_folder() / "cache"


def key_of(facts: dict[str, Any]) -> str:
    """The key of a trunk: a hash of the facts that does not depend on their order."""
    return fingerprint(json.dumps(facts, sort_keys=True))


def lock_of(folder: Path) -> FileLock:
    """The lock for writing or removing a cache. Its file is next to the folder and is never removed."""
    return FileLock(folder.with_name(f"{_key(folder)}.lock"))


def cache_folders(root: Path) -> list[CacheFolder]:
    """All caches under `root`, including incomplete ones, least recently used first.

    The user may have chosen any folder as root, so everything else under it is ignored.
    """
    paths = sorted(root.iterdir()) if root.is_dir() else []
    found = [_look(path) for path in paths if is_cache(path)]
    return sorted((folder for folder in found if folder), key=lambda folder: folder.used)


def is_cache(path: Path) -> bool:
    """True if a folder is a cache or the remainder of one. Links are not followed.

    Either its key.json is valid, or it contains only files that a cache has. In a cache key.json is written
    before the first shard, so a folder with shards alone is not a cache, unless it was being removed.
    """
    if not _NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    if _about(path):
        return True
    try:
        with os.scandir(path) as entries:
            files = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    except OSError:  # no permission, or just removed
        return False
    shards, tables = (list(filter(pattern.fullmatch, files)) for pattern in (_SHARD, _TABLE))
    only_ours = all(files.values()) and len(shards) + len(tables) == len(files)
    return only_ours and (not shards or bool(tables) or path.name != _key(path))


def chosen(root: Path, keys: Sequence[str]) -> list[CacheFolder]:
    """The caches with these keys or prefixes of keys. UsageError if one fits no cache or several."""
    folders = cache_folders(root)
    picked: list[CacheFolder] = []
    for key in keys:
        fits = [folder for folder in folders if key and folder.key.startswith(key)]
        names = sorted({folder.key for folder in fits})
        if len(names) != 1:
            which = f"fits {len(names)} caches: {', '.join(names)}" if names else "does not fit any cache"
            remedy = f"`talik cache list --cache {root}` shows the keys."
            raise UsageError(f"{key!r} {which}", where=root, remedy=remedy)
        picked += [folder for folder in fits if folder not in picked]
    return picked


def remove(folder: CacheFolder) -> bool:
    """Removes a cache; False if another process is writing it (or, on Windows, reading it).

    Raises:
        UsageError: The folder, or one with the temporary name used here, is not a cache. Nothing is removed.
    """
    with _if_free(folder.path) as free:
        gone = folder.path.with_name(f".{folder.key}.gone")
        for path in (folder.path, gone):
            if os.path.lexists(path) and not is_cache(path):
                problem = "this folder is not a cache of Talik and was not removed"
                raise UsageError(problem, where=path, remedy="Move it to another place.")
        if free and folder.path != gone:
            if gone.exists():
                shutil.rmtree(gone)
            free = _renamed(folder.path, gone)  # so that no process finds a partly removed cache
        if free and gone.exists():
            shutil.rmtree(gone)
        return free


def make_room(root: Path, needed: int, limit: int | float, keep: Path) -> list[CacheFolder]:
    """Removes least recently used caches until there is room for more hidden states.

    Args:
        root: The folder of all caches.
        needed: The bytes that will be written.
        limit: The most bytes that all caches may take; 0 for no limit.
        keep: The cache that will be written; it is not removed. Neither is one that another process writes.

    Returns:
        The caches that were removed.

    Raises:
        NoRoomError: There is not enough room. If `keep` and `needed` alone exceed the limit, nothing is
            removed.
    """
    if not limit:
        return []
    folders = cache_folders(root)
    kept = sum(folder.size for folder in folders if folder.path.name == keep.name)
    used = sum(folder.size for folder in folders)
    removed: list[CacheFolder] = []
    for folder in folders:
        enough = used + needed <= limit or kept + needed > limit
        if not enough and folder.path.name != keep.name and remove(folder):
            removed.append(folder)
            used -= folder.size
    if used + needed > limit:
        others = "" if kept + needed > limit else f", other caches in use take {_gb(used - kept)}"
        raise NoRoomError(
            f"the trunk's cache needs {_gb(needed)} more: it takes {_gb(kept)} now{others}, and cache_gb "
            f"allows {_gb(limit)}",
            where=root,
            remedy="Raise cache_gb (0: no limit), or see `talik cache list` and `talik cache clear`.",
        )
    return removed


def _look(path: Path) -> CacheFolder | None:
    """Reads the state of a cache; None if it has just been removed."""
    try:
        with os.scandir(path) as entries:
            files = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
        changed = path.stat().st_mtime
    except FileNotFoundError:
        return None
    about, state, tokens = _about(path), "unfinished", 0
    if about and path.name == _key(path):
        state = "usable"
        shards = (name for name in files if name.endswith(".bin") and f"{name[:-3]}json" in files)
        of_token = about.get("token_bytes")
        if isinstance(of_token, int) and of_token > 0:
            tokens = sum(files[name].st_size for name in shards) // of_token
    with _if_free(path) as free:
        state = state if free else "being written"
    used = files["key.json"].st_mtime if "key.json" in files else changed
    size = sum(file.st_size for file in files.values())
    return CacheFolder(path, _key(path), state, str(about.get("model", "")), tokens, size, used)


def _about(path: Path) -> dict[str, Any]:
    """The content of key.json; {} if it is missing, damaged or does not match the name of the folder."""
    try:
        about = read_json(path / "key.json")
        return about if key_of(about["facts"]) == _key(path) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _key(path: Path) -> str:
    return path.name.strip(".").split(".")[0]


@contextmanager
def _if_free(folder: Path) -> Iterator[bool]:
    """Takes the lock of a cache if it is free, and yields whether it was.

    A cache without a lock file is free.
    """
    lock = lock_of(folder)
    if not Path(lock.lock_file).exists():
        yield True
        return
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _renamed(path: Path, to: Path) -> bool:
    try:
        path.rename(to)
    except FileNotFoundError:
        return True  # another process has just removed it
    except PermissionError:
        if sys.platform != "win32":
            raise
        return False  # a process has one of its files open
    return True


def _gb(size: int | float) -> str:
    return f"{size / 1e9:,.3f} GB"
