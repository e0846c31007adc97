"""All that differs between Linux, Windows and macOS."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")  # where Linux shows what containers and services may take
_OWN_CGROUPS = Path("/proc/self/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_... of malloc.h
_CGROUP_FILES = {  # version: limit and usage in bytes; the part of the usage that is given back on demand
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "v2": ("memory.max", "memory.current", "inactive_file"),
}
_ZEROS = 1 << 20  # bytes of a file that are written at once where none can be reserved


def home_folder() -> Path:
    """Where Talik keeps caches and converted models: $TALIK_HOME, or the system's folder for caches."""
    if "TALIK_HOME" in os.environ:
        return Path(os.environ["TALIK_HOME"]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "talik"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "talik"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "talik"


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: anonymous and shared anonymous pages.

    Linux: RssAnon + RssShmem. Windows: what is committed to this process alone, which is cheap to ask for.
    Elsewhere the memory that only this process holds (psutil's `uss`).
    """
    if sys.platform == "linux":
        return _resident("RssAnon", "RssShmem")
    if sys.platform == "win32":
        return psutil.Process().memory_info().private  # pyright: ignore[reportAttributeAccessIssue]
    return psutil.Process().memory_full_info().uss


def _resident(*kinds: str) -> int:
    """The sum of these rows of Linux's /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return sum(int(status.partition(f"{kind}:")[2].split(maxsplit=1)[0]) * 1024 for kind in kinds)


def free_memory() -> int:
    """Bytes of RAM that this process can still take: what the system has, and what limits leave of it."""
    left = (limit - used for limit, used in _limits())
    return max(0, min([psutil.virtual_memory().available, *left]))


def total_memory() -> int:
    """Bytes of RAM that this process could have in all: the machine's, or the lowest limit on it."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of all that bounds this process beside the RAM itself."""
    if sys.platform != "linux":  # elsewhere there are no cgroups, and rlimits of memory are not enforced
        return
    import resource

    yield from _cgroup_limits()
    memory = psutil.Process().memory_info()
    for kind, used in ((resource.RLIMIT_DATA, memory.data), (resource.RLIMIT_AS, memory.vms)):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit, used


def configure_allocators() -> None:
    """Settles on Linux how memory is given out, before much is: what is held shall be what is used.

    CUDA's allocator gets expandable segments, unless the environment has its own settings. glibc maps blocks
    of 2 MiB and more apart where its heap has no room, and gives them back when they are freed; it would
    learn from the first to keep all up to 32 MiB (mallopt(3)). Others stay to be used again, the last 16 MiB
    of the heap too, until `trim_heap`.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 2 << 20)
        mallopt(_TRIM_THRESHOLD, 16 << 20)


def release_free_memory() -> None:
    """Gives back what is free in this process: glibc keeps what lies below something that is still used."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Gives back whole pages that are free between others in glibc's heap; 1 to 12 ms."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def limited_memory(most: int) -> Iterator[Callable[[], None]]:
    """Inside, this process gets no more than `most` bytes of anonymous memory. Linux only: RLIMIT_DATA.

    That limit counts what was asked for and never touched, or given back within a heap, too: what is so when
    what it yields is called first, and whenever it is called again, comes on top; pages of files in memory
    (tmpfs) do not count. MemoryError then if more is held already: with no room at all any line of any
    library may fail in its own way.
    """
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    hard = before[1]

    def limit() -> None:
        if (held := _resident("RssAnon")) > most:
            raise MemoryError(f"{held:,} bytes are held already, and the limit is {most:,}")
        soft = most + max(0, psutil.Process().memory_info().data - held)
        resource.setrlimit(
            resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
        )

    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Limit and working set of this process's memory cgroup and of every one around it.

    A container may see its own cgroup as the root: then the folder of its full name is not there.
    """
    lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines() if _OWN_CGROUPS.exists() else []
    for _, kinds, name in (line.split(":", 2) for line in lines):
        if kinds and "memory" not in kinds.split(","):
            continue
        root = _CGROUPS / "memory" if kinds else _CGROUPS
        inner = root / name.lstrip("/")
        files = _CGROUP_FILES["v1" if kinds else "v2"]
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root):
                yield from _limit_in(folder, *files)


def _limit_in(folder: Path, limit: str, usage: str, inactive: str) -> Iterator[tuple[int, int]]:
    with contextlib.suppress(OSError, ValueError):  # none there, closed, or "max"
        most = int((folder / limit).read_text(encoding="ascii"))
        used = int((folder / usage).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii")
        counts = dict(line.split() for line in stat.splitlines())
        yield most, used - int(counts.get(inactive, 0))


def processor_name() -> str:
    """What the processor calls itself, as in "AMD EPYC 7763 64-Core Processor"."""
    name = ""
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            name = next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), "")
        elif sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return " ".join(name.split()) or platform.processor() or platform.machine()


def can_drop_pages() -> bool:
    """Whether `drop_pages` does anything here: else what was just written is read from memory."""
    return hasattr(os, "posix_fadvise")


def drop_pages(file: int, start: int, size: int) -> None:
    """Says that these bytes of an open file will not be read again soon, where a system takes hints.

    A size of 0 means up to the end.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


def reserve(file: int, size: int) -> None:
    """Takes `size` bytes of the disk for an open, empty file: OSError now and not when they are written."""
    if hasattr(os, "posix_fallocate"):
        if size:
            os.posix_fallocate(file, 0, size)
        return
    for start in range(0, size, _ZEROS):
        os.write(file, bytes(min(_ZEROS, size - start)))


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function true; a later one interrupts at once.

    Within a second it is the same one: a terminal and the program above it may both pass it on.
    """
    pressed = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        now = time.monotonic()
        if pressed and now - pressed > 1:
            signal.default_int_handler(number, frame)  # pyright: ignore[reportArgumentType]
        pressed = pressed or now

    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
