"""Compares the planned and the measured memory of a run by phase, and diagnoses out-of-memory errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from talik.base.errors import DoesNotFitError
from talik.base.files import format_bytes, quoted
from talik.base.system import anonymous_bytes, trim_heap
from talik.machine.peak_memory import PeakMemory
from talik.recipe.plan import Plan
from talik.simulate.account import account
from talik.simulate.storage_log import StorageLog
from talik.training.memory.scratch import Scratch
from talik.training.step.top import Top

TRACKED = 2  # steps whose storages are recorded on a CPU; an accelerator's allocator has its own counters
_ASKED = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMG]iB)")
_OUT = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "can't start new thread",
    "Cannot alloc",
)


class Promise:
    """Measures a run: samples its memory continuously, and records every storage of the first two steps.

    Attributes:
        between: Called between phases.
    """

    def __init__(self, plan: Plan) -> None:
        self.now, self.steps = "load", 0
        self.between: Callable[[], None] = lambda: None
        self._plan, self._device = plan, torch.device(plan.device)
        self._memory, self._log = PeakMemory(self._device), StorageLog()
        self._allocated: dict[str, int] = {}
        self._most = max(plan.promised.values(), default=0)
        self._began, self._size = 0, 0  # memory at the start of the phase, and the size of its work
        self._growth: dict[tuple[str, int], tuple[int, int]] = {}  # largest growth, by size

    def __enter__(self) -> Promise:
        self._memory.__enter__()
        self.phase("load")
        return self

    def __exit__(self, *stopped: object) -> None:
        self._memory.__exit__(*stopped)

    def phase(self, name: str, size: int = 0) -> None:
        """Starts a phase for a micro-batch of `size` tokens, a block of `size` parameters, or neither (0)."""
        peak, key = self._memory.phase(name), (self.now, self._size.bit_length())
        if self._began:
            self._growth[key] = max((peak - self._began, self._size), self._growth.get(key, (0, 0)))
        self._make_room(name, size)
        self.now, self._size = name, size
        self.between()
        if self._log.marks[-1][1] != name:
            self._log.phase(name)

    def _make_room(self, name: str, size: int) -> None:
        """Releases free memory if the coming phase might need more than planned.

        Memory that is kept is reused without being mapped again, which saves an eighth of a step of a small
        model (docs/log.md). The need of a phase is known from earlier ones of a similar size (within a power
        of two); before the first one, everything is released.
        """
        if self._device.type != "cpu":  # on a device, the plan is about its own memory
            return
        self._began = anonymous_bytes()
        grown, of = self._growth.get((name, size.bit_length()), (math.inf, 0))
        needed = grown * max(1.0, size / max(of, 1))
        if self._began + needed > self._most:
            trim_heap()
            self._began = anonymous_bytes()

    def take(self) -> int:
        """The highest sample since the last call, in bytes."""
        return self._memory.take()

    @contextmanager
    def step(self, top: Top, scratch: Scratch) -> Generator[None]:
        """Entered around a step; the first steps are recorded."""
        self.steps += 1
        if self.steps > TRACKED or self._device.type != "cpu":
            yield
            return
        self._log.mark((t for t in top.chain.model.state_dict().values() if not t.is_meta), "weights frozen")
        self._log.mark(scratch.values(), "optimizer state")
        with self._log:
            yield
        program = self._plan.promised.get("program", 0)
        self._allocated = {peak.phase: peak.bytes + program for peak in account(self._log).phases}
        if self.steps == TRACKED:
            self._log = StorageLog()

    def table(self, earlier: dict[str, dict[str, int]] | None = None) -> dict[str, dict[str, int]]:
        """Memory by phase in bytes: "promised", "allocated" (storages of the first steps and the program),
        "measured".

        `earlier` is the table of the run before it was resumed; its maxima count as well.
        """
        by_use = {
            "promised": self._plan.promised,
            "allocated": {
                name: self._allocated.get(name, 0) for name in ("forward", "loss", "backward", "update")
            },
            "measured": self._memory.phases,
        }
        now = {
            phase: {use: sizes[phase] for use, sizes in by_use.items() if sizes.get(phase)}
            for phase in self._memory.phases
        }
        before = earlier or {}
        return {
            phase: {
                use: max(rows.get(phase, {}).get(use, 0) for rows in (before, now))
                for use in {**before.get(phase, {}), **now.get(phase, {})}
            }
            for phase in {**before, **now}
        }

    def describe(self) -> str:
        """The difference between planned and measured memory, in words."""
        phase, measured = max(self._memory.phases.items(), key=lambda item: item[1])
        took = f"took {format_bytes(measured)} at most ({phase})"
        promised = max((size for size in self._plan.promised.values()), default=0)
        if not promised:
            return f"{took}; nothing was promised"
        off = 100 * (measured / promised - 1)
        return f"promised {format_bytes(promised)}, {took}: {abs(off):.1f} % {'more' if off > 0 else 'less'}"

    def broken_by(self, error: BaseException, run: object) -> DoesNotFitError | None:
        """The diagnosis of an out-of-memory error; None for any other error."""
        if (cause := _without_memory(error)) is None:
            return None
        text = str(cause)
        self._memory.phase(self.now)
        found = _ASKED.search(text)
        said = f": {text}" if text and isinstance(cause, MemoryError) else ""
        more = found and (format_bytes(int(found[1])) if found[1] else found[2])
        asked = f": allocating {more} failed with " if more else f"{said}; "
        promised = self._plan.promised.get(self.now)
        where = f"step {self.steps}, {self.now}" if self.steps else self.now
        had = f"{format_bytes(self._memory.phases.get(self.now, 0))} in use"
        planned = f" (planned: {format_bytes(promised)})" if promised else ""
        return DoesNotFitError(
            f"out of memory in {where}{asked}{had}{planned}",
            remedy=f"See which phase and tensors take it: talik explain {quoted(run)}",
        )


def _without_memory(error: BaseException | None) -> BaseException | None:
    """The out-of-memory error among an error and its causes."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(o in str(error) for o in _OUT):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def broken_fields(error: DoesNotFitError, promise: Promise) -> dict[str, Any]:
    """The fields that `talik explain RUN` needs for a run that ran out of memory."""
    return {"problem": error.problem, "phase": promise.now, "step": promise.steps, "memory": promise.table()}
