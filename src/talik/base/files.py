"""Atomic writes, folders that appear when they are complete, hashes, and checks of free disk space.

No file is overwritten in place, because somebody may have mapped it: a temporary file in the same folder is
written, synced and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Generator
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from talik.base.errors import NoRoomError, UsageError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{mark}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for mark, base in (("b", 1000), ("ib", 1024))
}


@contextlib.contextmanager
def atomic(path: Path) -> Generator[BinaryIO]:
    """Opens a binary file that appears under `path` only once it is complete and synced to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())  # mkstemp makes it private; files of a shared model folder are not
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _settle(folder: Path) -> None:
    """Syncs every file of a folder to disk and applies the umask: some libraries write private files."""
    mask = _umask()
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 atomically."""
    with atomic(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, once: bool = False) -> Any:
    """Reads a JSON file in UTF-8.

    Args:
        path: The file.
        once: Refuse a file in which a key is given twice.

    Raises:
        ValueError: The file is not valid JSON, is nested too deeply, or has a key twice.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once if once else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"the key {name[:60]!r} is given twice")
        seen.add(name)
    return dict(pairs)


@contextlib.contextmanager
def finished_folder(path: Path) -> Generator[Path]:
    """Makes a folder that appears under `path` only once everything in it is synced to disk.

    It is built next to `path` under a name that only this process uses, and removed if an error is raised.
    Remains of killed processes are removed first.

    Raises:
        UsageError: Another process has made `path` in the meantime, and it is not empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_parts(path)
    part = path.parent / f"{_part_stem(path)}.{os.getpid()}-{os.urandom(3).hex()}.part"
    part.mkdir()
    try:
        yield part
        _settle(part)
        _put(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _part_stem(path: Path) -> str:
    """The beginning of the names of a folder under construction, short enough for every file system."""
    return f".{path.name}" if len(path.name.encode()) < 200 else f".{fingerprint(path.name)}"


def _clear_parts(path: Path) -> None:
    """Removes folders under construction whose processes have ended."""
    for part in path.parent.glob(f"{glob.escape(_part_stem(path))}.*.part"):
        match = re.search(r"\.(\d+)-[0-9a-f]{6}\.part$", part.name)
        if match and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(part, ignore_errors=True)


def _put(part: Path, path: Path) -> None:
    """Renames a finished folder to its final name, in place of an empty folder."""
    try:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        part.rename(path)
    except OSError as error:
        if error.errno not in (
            errno.ENOTEMPTY,
            errno.EEXIST,
            errno.EBUSY,
            errno.EINVAL,
            errno.EACCES,
            errno.ENOTDIR,
        ):
            raise
        if path.is_dir() and any(path.iterdir()):
            problem = "exists already: another process has made it in the meantime"
        else:
            problem = f"cannot be put in place: {os.strerror(error.errno)}"
        raise UsageError(problem, where=path, remedy="Name a folder that is new or empty.") from None


def check_folder_place(path: Path) -> None:
    """Checks that `finished_folder` can make a folder of this name.

    Raises:
        UsageError: It is the current folder or a mount point, or its name is too long for the file system.
    """
    try:
        there = path.exists()
        if there and path.samefile(Path.cwd()):
            raise UsageError("is the current folder", where=path, remedy="Name a new folder in it.")
        if there and os.path.ismount(path):
            raise UsageError(
                "is a mount point", where=path, remedy=f"Name a new folder in it: {path / 'out'}"
            )
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UsageError(f"cannot be used: {reason}", where=path, remedy="Name another place.") from None


def sync_folder(folder: Path) -> None:
    """Syncs a folder's list of files to disk, where the operating system supports it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def fingerprint(*parts: bytes | memoryview | str) -> str:
    """A hash of the parts in this order: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def quoted(path: object) -> str:
    """A path as it is typed in a shell: quoted if it contains blanks or other special characters."""
    text = str(path)
    if os.name == "nt":
        return f'"{text}"' if re.search(r"[\s&()^;,=]", text) else text
    return shlex.quote(text)


def need_room(folder: Path, needed: int, what: str) -> None:
    """Checks that the disk under `folder` has `needed` bytes and a margin free.

    Raises:
        NoRoomError: It has less; `what` names what was to be written.
    """
    margin = 64 << 20
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed + margin:
        raise NoRoomError(
            f"{what}: {format_bytes(needed)} are needed, and the disk has {format_bytes(free)} free "
            f"({format_bytes(margin)} of which stay free)",
            where=folder,
            remedy="Make room, or name a folder on another disk.",
        )


def format_bytes(size: int | float) -> str:
    """A number of bytes in the largest fitting binary unit: 1536 becomes '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def parse_size(text: str | int | float, option: str | None = None) -> int:
    """Parses a size: 1536, "1536", "24GiB" (2^30 bytes each), "24 GB" (10^9 bytes each), "1.5TB".

    Args:
        text: The size.
        option: The command-line option that it came from, for the error.

    Raises:
        UsageError: It is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise UsageError(
            f"{text!r} is not a size",
            where=option,
            remedy="Write it as 24GiB (2^30 bytes each), 24GB (10^9) or 25769803776.",
        )
    return int(Decimal(match[1]) * _UNITS[match[2]])
