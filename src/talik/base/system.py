"""Everything that differs between Linux, Windows and macOS."""

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
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")  # where Linux shows the memory limits of containers and services
_OWN_CGROUPS = Path("/proc/self/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_... of malloc.h
_CGROUP_FILES = {  # version: limit and usage in bytes; the part of the usage that is reclaimed on demand
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "v2": ("memory.max", "memory.current", "inactive_file"),
}
_ZEROS = 1 << 20  # bytes written at once where a file cannot be reserved


def home_folder() -> Path:
    """The folder of caches and converted models: $TALIK_HOME, or the system's folder for caches."""
    if "TALIK_HOME" in os.environ:
        return Path(os.environ["TALIK_HOME"]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "talik"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "talik"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "talik"


def anonymous_bytes() -> int:
    """Memory of this process that is not backed by a file: anonymous and shared anonymous pages, in bytes.

    Linux: RssAnon + RssShmem. Windows: the private commit charge, which is cheap to read. Elsewhere the
    unique set size (`uss` of psutil).
    """
    if sys.platform == "linux":
        return _resident("RssAnon", "RssShmem")
    if sys.platform == "win32":
        return psutil.Process().memory_info().private  # pyright: ignore[reportAttributeAccessIssue]
    return psutil.Process().memory_full_info().uss


def _resident(*kinds: str) -> int:
    """The sum of the named rows of /proc/self/status on Linux, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return sum(int(status.partition(f"{kind}:")[2].split(maxsplit=1)[0]) * 1024 for kind in kinds)


def free_memory() -> int:
    """Bytes of RAM that this process can still allocate: free memory of the system, reduced by limits."""
    left = (limit - used for limit, used in _limits())
    return max(0, min([psutil.virtual_memory().available, *left]))


def total_memory() -> int:
    """Bytes of RAM in all: of the machine, or the lowest limit of this process."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and usage, in bytes, of everything that bounds the memory of this process other than the RAM."""
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
    """Configures the memory allocators so that freed memory is returned to the system.

    CUDA: expandable segments, unless the environment sets something else. Linux: glibc uses mmap for blocks
    of 2 MiB and more that the heap has no room for, and returns them when they are freed; by default it would
    raise that threshold to 32 MiB over time (mallopt(3)). Smaller blocks stay in the heap for reuse, up to 16
    MiB at its end, until `trim_heap` is called.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 2 << 20)
        mallopt(_TRIM_THRESHOLD, 16 << 20)


def release_free_memory() -> None:
    """Collects garbage and returns free memory of the heap to the system."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Returns free whole pages inside the heap of glibc to the system; takes 1 to 12 ms."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def limited_memory(most: int) -> Generator[Callable[[], None]]:
    """Limits the anonymous memory of this process while the context is entered. Linux only (RLIMIT_DATA).

    RLIMIT_DATA also counts memory that was reserved but never touched, or freed inside the heap. The yielded
    function measures that excess and raises the limit by it: call it once at the start and again between
    phases. Pages of files in memory (tmpfs) do not count.

    Args:
        most: The limit in bytes.

    Raises:
        MemoryError: More than `most` bytes are in use already.
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
    """Limit and working set of the memory cgroup of this process and of every enclosing one.

    A container may see its own cgroup as the root; the folder with its full name does not exist then.
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
    """The model name of the processor, as in "AMD EPYC 7763 64-Core Processor"."""
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
    """True if `drop_pages` has an effect here; otherwise data just written are read from memory."""
    return hasattr(os, "posix_fadvise")


def drop_pages(file: int, start: int, size: int) -> None:
    """Advises the system that these bytes of an open file will not be read again soon.

    A size of 0 means up to the end.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


def reserve(file: int, size: int) -> None:
    """Allocates `size` bytes on disk for an open, empty file, so that a full disk raises OSError now."""
    if hasattr(os, "posix_fallocate"):
        if size:
            os.posix_fallocate(file, 0, size)
        return
    for start in range(0, size, _ZEROS):
        os.write(file, bytes(min(_ZEROS, size - start)))


@contextlib.contextmanager
def deferred_interrupt() -> Generator[Callable[[], bool]]:
    """Defers the first Ctrl-C: it makes the yielded function return True. A second one interrupts at once.

    Signals within one second count as one, because a terminal and a parent process may both send it.
    """
    pressed = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        now = time.monotonic()
        if pressed and now - pressed > 1:
            signal.default_int_handler(number, frame)  # pyright: ignore[reportArgumentType]
        pressed = pressed or now

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # signals can be handled only in the main thread
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
