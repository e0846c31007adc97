"""Worker processes on all cores: chunks in, outcomes out, in the order of the chunks.

Each worker is a Python of its own at the other end of two pipes (`worker`). Unlike the processes of
`multiprocessing` it never runs the user's script again, it loads no torch, and it ends when its parent does,
killed or not.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from talik.base.errors import TalikError
from talik.base.system import free_memory

_CODE = "import sys; sys.path[:] = {!r}; from talik.data.preparing.worker import main; main()"
_ROOM = 1 << 30  # bytes of free memory for each worker, which takes a quarter of that as a rule
_PATIENCE = 10  # seconds in which a worker that has nothing more to do ends by itself


def worker_count() -> int:
    """How many workers there should be: one for each core, fewer where memory is short."""
    return max(1, min(cores(), free_memory() // _ROOM))


def cores() -> int:
    """How many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Worker:
    """One worker process."""

    def __init__(self, load: Callable[[], Any], options: Any) -> None:
        command = [sys.executable, "-c", _CODE.format(sys.path)]
        # In a session of its own a terminal's Ctrl-C does not reach it while it starts.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._how: tuple[Any, ...] = (load, options)

    def prepare(self, chunk: Any) -> Any:
        """The outcome of a chunk.

        Raises:
            TalikError: The process has died.
        """
        assert self._process.stdin and self._process.stdout
        try:
            for value in ([self._how] if self._how else []) + [chunk]:
                pickle.dump(value, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._how = ()
            self._process.stdin.flush()
            outcome = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise self._died() from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def end(self) -> None:
        """Ends the process."""
        assert self._process.stdin and self._process.stdout
        with suppress(OSError):  # it has died: the rest of the buffer cannot be written
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _died(self) -> TalikError:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return TalikError(
            f"a process that prepared rows has ended {how}, for lack of memory as a rule",
            remedy="Run the same command again: it goes on after the rows that are prepared.",
        )


def in_order(
    work: Iterator[Any], load: Callable[[], Any], options: Any, count: int
) -> Iterator[tuple[Any, Any]]:
    """Each chunk, without its rows (`Chunk.bare`), and its outcome, in order; a few are held at once."""
    workers = [Worker(load, options) for _ in range(count)]
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def prepare(chunk: Any) -> Any:
        worker = idle.get()
        try:
            return worker.prepare(chunk)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(count)
    waiting: deque[tuple[Any, Future[Any]]] = deque()
    try:
        for chunk in work:
            waiting.append((chunk.bare(), pool.submit(prepare, chunk)))
            if len(waiting) >= 2 * count:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for worker in workers:
            worker.end()
