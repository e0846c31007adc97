"""All that differs between Linux, Windows and macOS."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil


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

    Linux: RssAnon + RssShmem. Elsewhere the memory that only this process holds (psutil's `uss`).
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        rows = dict(line.split(":", 1) for line in status.splitlines())
        return sum(int(rows[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))
    return psutil.Process().memory_full_info().uss


def forget_pages(file: int, start: int, size: int) -> None:
    """Says that these bytes of an open file will not be read again soon, where a system takes hints."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[Callable[[], bool]]:
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
