"""Prepares chunks in worker processes on all cores; outcomes are returned in the order of the chunks.

Each worker is a separate Python process connected by two pipes (`worker`). Unlike a process of
`multiprocessing` it does not run the user's script again, does not load torch, and exits when its parent
exits, even when that was killed.
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
_MEMORY_PER_WORKER = 1 << 30  # bytes of free memory for each worker; it usually needs a quarter of that
_EXIT_SECONDS = 10  # how long to wait for a worker to exit by itself before it is killed


def worker_count() -> int:
    """Returns the number of workers to start: one for each core, fewer if memory is short."""
    return max(1, min(cores(), free_memory() // _MEMORY_PER_WORKER))


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Worker:
    """One worker process."""

    def __init__(self, load: Callable[[], Any], options: Any) -> None:
        command = [sys.executable, "-c", _CODE.format(sys.path)]
        # In its own session a terminal's Ctrl-C does not reach the process while it starts.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._setup: tuple[Any, ...] = (load, options)  # sent before the first chunk

    def prepare(self, chunk: Any) -> Any:
        """Sends a chunk and returns its outcome.

        Raises:
            TalikError: The process has died.
        """
        assert self._process.stdin and self._process.stdout
        try:
            if self._setup:
                pickle.dump(self._setup, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
                self._setup = ()
            pickle.dump(chunk, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            outcome = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise self._died() from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def end(self) -> None:
        """Closes the pipes and waits until the process has exited."""
        assert self._process.stdin and self._process.stdout
        with suppress(OSError):  # it has died, so the rest of the buffer cannot be written
            self._process.stdin.close()
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _died(self) -> TalikError:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return TalikError(
            f"a process that prepared rows has ended {how}; the usual cause is a lack of memory",
            remedy="Run the same command again: it continues after the rows that are prepared.",
        )


def in_order(
    work: Iterator[Any], load: Callable[[], Any], options: Any, count: int
) -> Iterator[tuple[Any, Any]]:
    """Yields each chunk, without its rows (`Chunk.bare`), and its outcome, in order.

    At most two chunks for each worker are in memory.
    """
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
    pending: deque[tuple[Any, Future[Any]]] = deque()
    try:
        for chunk in work:
            pending.append((chunk.bare(), pool.submit(prepare, chunk)))
            if len(pending) >= 2 * count:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for worker in workers:
            worker.end()
