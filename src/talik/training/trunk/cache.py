"""What the trunk hands on, one vector per token, unpadded, kept for every epoch and every later run.

The unit is a group: examples of one length that went through the trunk together. A hidden state depends on
the batch it was computed in, so a group is named by the tokens of its examples, in order, and is found again
in whatever data holds the same group. Groups lie in shards. A shard's table is written last, so a shard
without one was broken off; the others stay.
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
from talik.training.trunk.cache_shard import Damaged, Group, Place, ShardWriter, States, groups_of, read_table

__all__ = ["Cache", "Group", "States", "groups_of", "open_cache"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, longest file of the file system


def open_cache(
    root: Path,
    facts: dict[str, Any],
    width: int,
    dtype: torch.dtype,
    *,
    model: str = "",
    notify: Notify = silent,
) -> Cache:
    """The cache of the trunk that these facts (values of JSON) describe, empty if there was none.

    Hidden states have `width` numbers of `dtype`. `model` is what `talik cache list` shows. A cache whose
    key.json is damaged is removed: nobody knows what is in it. TalikError if it is in use, UsageError if its
    name is that of something else.
    """
    covered = json.loads(json.dumps({**facts, "format": 1, "width": width, "dtype": str(dtype)}))
    folder = root / key_of(covered)
    root.mkdir(parents=True, exist_ok=True)
    about = {"model": model, "token_bytes": width * dtype.itemsize, "facts": covered}
    if not _agrees(folder):
        notify(Status("cache", f"{folder / 'key.json'} disagrees with its folder, which is made anew"))
        if not remove(CacheFolder(folder, folder.name, "unfinished", "", 0, 0, 0.0)):
            raise TalikError("is in use and its key.json is damaged", where=folder, remedy="Try again later.")
    return Cache(folder, about, width, dtype, notify)


class Cache:
    """The cache of one trunk, as it was when it was opened or when `writing` was entered."""

    def __init__(
        self, folder: Path, about: dict[str, Any], width: int, dtype: torch.dtype, notify: Notify
    ) -> None:
        self.folder = folder
        self._about, self._width, self._dtype, self._notify = about, width, dtype, notify
        self._token_bytes = width * dtype.itemsize
        self._places: dict[str, Place] = {}
        self._look()

    def missing(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that have to be computed, each once, in their order."""
        first = {group.digest: group for group in reversed(groups)}
        return [
            group for group in groups if group.digest not in self._places and group is first[group.digest]
        ]

    def size(self, groups: Sequence[Group]) -> int:
        """The bytes that their hidden states take."""
        return sum(group.tokens for group in groups) * self._token_bytes

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Nobody else writes meanwhile; first looks at what others have written, and tidies up.

        Waits for a process that is writing. Until it ends, no other process removes the cache.
        """
        lock = lock_of(self.folder)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._notify(Status("cache", f"another process is writing {self.folder}: waiting for it"))
            lock.acquire()
        try:
            finished, damaged = self._look()
            self._tidy(finished, damaged)
            yield
        finally:
            lock.release()

    @contextmanager
    def new_shard(self, groups: Sequence[Group]) -> Iterator[ShardWriter]:
        """A shard of these groups, found once all of them are written and on the disk; only in `writing`.

        `groups` as `missing` gives them, or a part. Nothing stays of a shard that was broken off. Raises
        NoRoomError, before it begins where that can be known.
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

    def states(self, groups: Sequence[Group]) -> States:
        """The hidden states of these groups' examples, to read in any order. TalikError if one is missing."""
        if missing := self.missing(groups):
            raise TalikError(
                f"{sum(group.tokens for group in missing):,} tokens are not in the trunk's cache",
                where=self.folder,
                remedy="Start the run again, or go on with it: talik resume RUN. They are computed again.",
            )
        return States([(group, self._places[group.digest]) for group in groups], self._width, self._dtype)

    def _look(self) -> tuple[set[str], dict[str, Damaged]]:
        """Reads all tables; returns the names of finished shards, and what is wrong with the others."""
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / "key.json").exists():
            write_json(self.folder / "key.json", {**self._about, "made": time.strftime("%Y-%m-%dT%H:%M:%S")})
        with suppress(OSError):  # somebody else's folder, which may be read
            os.utime(self.folder / "key.json")
        self._places, finished, damaged = {}, set(), {}
        for path in sorted(self.folder.glob("shard-*.json")):
            try:
                file = path.with_suffix(".bin")
                self._places |= read_table(file, self.folder.name, self._token_bytes)
                finished.add(path.stem)
            except Damaged as error:
                damaged[path.stem] = error
        return finished, damaged

    def _tidy(self, finished: set[str], damaged: dict[str, Damaged]) -> None:
        """Removes what was broken off and what cannot be used."""
        for name, error in damaged.items():
            where = self.folder / f"{name}.bin"
            self._notify(Status("cache", f"{where} is damaged and removed, to be computed again: {error}"))
        for path in sorted(self.folder.iterdir(), reverse=True):  # tables before their shards
            if path.name.lstrip(".").startswith("shard-") and path.stem not in finished:
                with suppress(PermissionError):  # Windows: somebody still has it open
                    path.unlink(missing_ok=True)


def _agrees(folder: Path) -> bool:
    """Whether the facts in a folder's key.json are those of its name; also if there is none yet."""
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
        remedy="Make room or name another folder (cache); finished files stay: talik resume RUN goes on.",
    )
