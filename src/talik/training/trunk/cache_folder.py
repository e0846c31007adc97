"""The folders of the trunk's caches: one for each trunk, named by what its hidden states depend on.

    ROOT/KEY/key.json           the facts that KEY is the fingerprint of; its time is the last use
    ROOT/KEY/shard-00000.bin    hidden states; shard-00000.json is its table
    ROOT/KEY.lock               held by the process that writes there

Needs no torch, so that listing caches is quick.
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

State = Literal["usable", "being written", "unfinished"]
_NAME = re.compile(r"([0-9a-f]{32})|\.([0-9a-f]{32})\.(part|gone)")
_SHARD = re.compile(r"\.?shard-\d+\.(bin|json)(\.\w+)?")  # or a temporary one
_TABLE = re.compile(r"\.?key\.json(\.\w+)?")


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """One cache as it lies on the disk. `size` is in bytes, `used` in seconds since 1970."""

    path: Path
    key: str
    state: State
    model: str
    tokens: int
    size: int
    used: float


def default_root() -> Path:
    """The folder of all caches, where the recipe names none."""
    return home_folder() / "cache"


def key_of(facts: dict[str, Any]) -> str:
    """Names a trunk: the same for the same facts, whatever their order."""
    return fingerprint(json.dumps(facts, sort_keys=True))


def lock_of(folder: Path) -> FileLock:
    """What the process that writes or removes this cache holds. It lies beside the folder and stays."""
    return FileLock(folder.with_name(f"{_key(folder)}.lock"))


def cache_folders(root: Path) -> list[CacheFolder]:
    """All caches under `root`, least recently used first, and what was broken off of one.

    The user may have named any folder: nothing else under it is looked at, let alone removed.
    """
    paths = sorted(root.iterdir()) if root.is_dir() else []
    found = [_look(path) for path in paths if is_cache(path)]
    return sorted((folder for folder in found if folder), key=lambda folder: folder.used)


def is_cache(path: Path) -> bool:
    """Whether a folder is a cache, or what is left of one: its table says so, or all its files are a cache's.

    A cache has its table before its first shard: shards alone are somebody else's, but for a folder that was
    being removed. Links are never followed.
    """
    if not _NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    if _about(path):
        return True
    try:
        with os.scandir(path) as entries:
            files = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    except OSError:  # closed to us, or just removed
        return False
    shards, tables = (list(filter(pattern.fullmatch, files)) for pattern in (_SHARD, _TABLE))
    only_ours = all(files.values()) and len(shards) + len(tables) == len(files)
    return only_ours and (not shards or bool(tables) or path.name != _key(path))


def chosen(root: Path, keys: Sequence[str]) -> list[CacheFolder]:
    """The caches with these keys, or beginnings of keys. UsageError if one names none or several."""
    folders, picked = cache_folders(root), []
    for key in keys:
        fits = [folder for folder in folders if key and folder.key.startswith(key)]
        names = sorted({folder.key for folder in fits})
        if len(names) != 1:
            which = f"begins {len(names)} keys: {', '.join(names)}" if names else "is no cache"
            remedy = f"`talik cache list --cache {root}` shows the keys."
            raise UsageError(f"{key!r} {which}", where=root, remedy=remedy)
        picked += [folder for folder in fits if folder not in picked]
    return picked


def remove(folder: CacheFolder) -> bool:
    """Removes a cache; False if another process is writing it (or, on Windows, reading it).

    Raises:
        UsageError: There is, or lies in the way, something that is no cache. Nothing is removed then.
    """
    with _if_free(folder.path) as free:
        gone = folder.path.with_name(f".{folder.key}.gone")
        for path in (folder.path, gone):
            if os.path.lexists(path) and not is_cache(path):
                raise UsageError("is no cache of Talik and stays", where=path, remedy="Move it away.")
        if free and folder.path != gone:
            if gone.exists():
                shutil.rmtree(gone)
            free = _renamed(folder.path, gone)  # at once: nobody finds half of it
        if free and gone.exists():
            shutil.rmtree(gone)
        return free


def make_room(root: Path, needed: int, limit: int | float, keep: Path) -> list[CacheFolder]:
    """Removes least recently used caches until all of them and `needed` bytes take at most `limit` bytes.

    Never `keep`, nor one that another process is writing. Returns what was removed. A limit of 0 is none.
    Raises NoRoomError, before anything is removed if `keep` and `needed` alone are more than the limit.
    """
    if not limit:
        return []
    folders = cache_folders(root)
    kept = sum(folder.size for folder in folders if folder.path.name == keep.name)
    used, removed = sum(folder.size for folder in folders), []
    for folder in folders:
        enough = used + needed <= limit or kept + needed > limit
        if not enough and folder.path.name != keep.name and remove(folder):
            removed.append(folder)
            used -= folder.size
    if used + needed > limit:
        others = "" if kept + needed > limit else f", other processes write {_gb(used - kept)} of others,"
        raise NoRoomError(
            f"the trunk's cache: {_gb(needed)} are needed, it has {_gb(kept)} already{others} and cache_gb "
            f"allows {_gb(limit)}",
            where=root,
            remedy="Raise cache_gb (0: no bound), or see `talik cache list` and `talik cache clear`.",
        )
    return removed


def _look(path: Path) -> CacheFolder | None:
    """What lies there; None if it has just been removed."""
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
    """The table of a cache; an empty one where there is none that fits the name of the folder."""
    try:
        about = read_json(path / "key.json")
        return about if key_of(about["facts"]) == _key(path) else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _key(path: Path) -> str:
    return path.name.strip(".").split(".")[0]


@contextmanager
def _if_free(folder: Path) -> Iterator[bool]:
    """Holds the lock if nobody does, and says whether; a cache without a lock file is free."""
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
        return True  # somebody else has just removed it
    except PermissionError:
        if sys.platform != "win32":
            raise
        return False  # somebody has one of its files open
    return True


def _gb(size: int | float) -> str:
    return f"{size / 1e9:,.3f} GB"
