"""The cache of the trunk's hidden states: one unpadded vector per token, for every epoch and later runs.

The unit is a batch group: examples of equal length that went through the trunk together. A hidden state
depends on the batch it was computed in (another kernel, another rounding), so a batch group is identified by
the tokens of its examples, in order, and is found again in any data that contain the same batch group. Batch
groups are stored in shards. The table of a shard is written last: a shard without a table is incomplete and
is removed; complete shards stay.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from talik.base.errors import NoRoomError, TalikError
from talik.base.events import Notify, Status, silent
from talik.base.files import need_room, read_json, sync_folder, write_json
from talik.training.trunk.cache_folder import CacheFolder, key_of, lock_of, remove
from talik.training.trunk.cache_shard import (
    BatchGroup,
    CachedStates,
    GroupPlace,
    ShardDamagedError,
    ShardWriter,
    groups_of,
    read_table,
)

__all__ = ["BatchGroup", "Cache", "CachedStates", "groups_of", "open_cache"]

# No space on the disk, quota exceeded, file larger than the file system allows.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_cache(
    root: Path,
    facts: dict[str, Any],
    width: int,
    dtype: torch.dtype,
    *,
    model: str = "",
    notify: Notify = silent,
) -> Cache:
    """Opens the cache of one trunk; creates it if there is none.

    A cache whose key.json is damaged is removed, because its content is unknown.

    Args:
        root: The folder of all caches.
        facts: Everything that the trunk's hidden states depend on, as values of JSON.
        width: The size of a hidden state.
        dtype: The dtype of a hidden state.
        model: The name of the model that `talik cache list` shows.
        notify: Receives events.

    Raises:
        TalikError: The key.json is damaged, and another process uses the cache.
        UsageError: The folder of the cache exists and is not a cache.
    """
    covered = json.loads(json.dumps({**facts, "format": 1, "width": width, "dtype": str(dtype)}))
    folder = root / key_of(covered)
    root.mkdir(parents=True, exist_ok=True)
    about = {"model": model, "token_bytes": width * dtype.itemsize, "facts": covered}
    if not _agrees(folder):
        notify(Status("cache", f"{folder / 'key.json'} is damaged: the cache is removed and created again"))
        if not remove(CacheFolder(folder, folder.name, "unfinished", "", 0, 0, 0.0)):
            problem = "the key.json of this cache is damaged, and another process uses the cache"
            raise TalikError(problem, where=folder, remedy="Try again later.")
    return Cache(folder, about, width, dtype, notify)


class Cache:
    """The cache of one trunk. It reads the list of shards when it is opened and when `writing` is entered."""

    def __init__(
        self, folder: Path, about: dict[str, Any], width: int, dtype: torch.dtype, notify: Notify
    ) -> None:
        self.folder = folder
        self._about, self._width, self._dtype, self._notify = about, width, dtype, notify
        self._token_bytes = width * dtype.itemsize
        self._places: dict[str, GroupPlace] = {}
        self._read_tables()

    def missing(self, groups: Sequence[BatchGroup]) -> list[BatchGroup]:
        """The batch groups that are not in the cache, each once, in their order."""
        first = {group.digest: group for group in reversed(groups)}
        return [
            group for group in groups if group.digest not in self._places and group is first[group.digest]
        ]

    def size(self, groups: Sequence[BatchGroup]) -> int:
        """The size of their hidden states in bytes."""
        return sum(group.tokens for group in groups) * self._token_bytes

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the lock of the cache, so that no other process writes to it or removes it.

        Waits for a process that is writing. Then reads the tables again and removes damaged and incomplete
        shards.
        """
        lock = lock_of(self.folder)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._notify(Status("cache", f"another process is writing {self.folder}: waiting for it"))
            lock.acquire()
        try:
            complete, damaged = self._read_tables()
            self._remove_unusable(complete, damaged)
            yield
        finally:
            lock.release()

    @contextmanager
    def new_shard(self, groups: Sequence[BatchGroup]) -> Iterator[ShardWriter]:
        """Writes a shard; only within `writing`.

        The shard can be used once all batch groups are written and synced to the disk. Nothing is left of a
        shard that was interrupted by an error.

        Args:
            groups: The batch groups of the shard, from those that `missing` returns.

        Raises:
            NoRoomError: The disk is full; before anything is written if that is known then.
        """
        need_room(self.folder, self.size(groups), "the trunk's cache")
        numbers = (re.match(r"shard-(\d+)\.", path.name) for path in self.folder.iterdir())
        number = 1 + max((int(match[1]) for match in numbers if match), default=-1)
        path = self.folder / f"shard-{number:05d}.bin"
        stream = path.open("xb")
        try:
            with stream as file:
                writer = ShardWriter(file, groups, self._width, self._dtype)
                yield writer
                table = {"key": self.folder.name, "groups": writer.finish()}
            write_json(path.with_suffix(".json"), table)
            sync_folder(self.folder)
        except BaseException as error:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise _full(path, self.size(groups), error) from None
            raise
        self._places |= read_table(path, self.folder.name, self._token_bytes)

    def states(self, groups: Sequence[BatchGroup]) -> CachedStates:
        """Opens the hidden states of these batch groups. TalikError if some are not in the cache."""
        if missing := self.missing(groups):
            raise TalikError(
                f"{sum(group.tokens for group in missing):,} tokens are not in the trunk's cache",
                where=self.folder,
                remedy="Start the run again, or continue it: talik resume RUN. They are computed again.",
            )
        return CachedStates(
            [(group, self._places[group.digest]) for group in groups], self._width, self._dtype
        )

    def _read_tables(self) -> tuple[set[str], dict[str, ShardDamagedError]]:
        """Reads all tables; returns the names of complete shards, and the errors of damaged ones."""
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / "key.json").exists():
            write_json(self.folder / "key.json", {**self._about, "made": time.strftime("%Y-%m-%dT%H:%M:%S")})
        with suppress(OSError):  # the folder may be read-only for this user
            os.utime(self.folder / "key.json")
        complete: set[str] = set()
        damaged: dict[str, ShardDamagedError] = {}
        self._places = {}
        for path in sorted(self.folder.glob("shard-*.json")):
            try:
                file = path.with_suffix(".bin")
                self._places |= read_table(file, self.folder.name, self._token_bytes)
                complete.add(path.stem)
            except ShardDamagedError as error:
                damaged[path.stem] = error
        return complete, damaged

    def _remove_unusable(self, complete: set[str], damaged: dict[str, ShardDamagedError]) -> None:
        """Removes damaged and incomplete shards."""
        for name, error in damaged.items():
            where = self.folder / f"{name}.bin"
            self._notify(Status("cache", f"{where} is damaged: it is removed and computed again: {error}"))
        for path in sorted(self.folder.iterdir(), reverse=True):  # tables before their shards
            if path.name.lstrip(".").startswith("shard-") and path.stem not in complete:
                with suppress(PermissionError):  # Windows: a process still has it open
                    path.unlink(missing_ok=True)


def _agrees(folder: Path) -> bool:
    """True if the facts in key.json match the name of the folder, or if there is no key.json yet."""
    try:
        return key_of(read_json(folder / "key.json")["facts"]) == folder.name
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError):
        return False


def _full(path: Path, size: int, error: OSError) -> NoRoomError:
    return NoRoomError(
        f"the trunk's cache cannot be written: {error.strerror}; this file takes {size:,} bytes",
        where=path,
        remedy="Make room or choose another folder (cache). Then continue: talik resume RUN. Complete "
        "files of the cache are used again.",
    )
