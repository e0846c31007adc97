"""Evaluates a log of storages: the peak of each phase, its causes, and the first allocation over a budget."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from talik.simulate.storage_log import StorageLog


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest memory of a phase: bytes in all and by cause, the running block, and the operator."""

    phase: str
    bytes: int
    causes: dict[str, int]
    block: str
    operator: str


def highest(peaks: Iterable[Peak]) -> Peak:
    """The highest of the peaks of several phases; the first of equal ones."""
    return max(peaks, key=lambda peak: peak.bytes)


@dataclass(frozen=True, slots=True)
class Break:
    """The first allocation that exceeds a budget."""

    phase: str
    block: str
    operator: str
    shape: tuple[int, ...]
    bytes: int
    total: int


@dataclass(frozen=True, slots=True)
class Simulation:
    """The peaks of the phases of a run, in the order in which the phases first begin, and its computations.

    Attributes:
        flops: Floating-point operations by phase.
        moved: Bytes read and written by operators without products, by phase.
        routed: Whether memory depends on the choices of a router.
    """

    phases: tuple[Peak, ...]
    flops: dict[str, int]
    moved: dict[str, int]
    log: StorageLog
    routed: bool = False

    @property
    def peak(self) -> Peak:
        """The highest peak of all phases."""
        return highest(self.phases)

    def first_break(self, budget: int) -> Break | None:
        """The first storage with which more than `budget` bytes are allocated."""
        for number, phase, total in levels(self.log):
            if total > budget:
                made = self.log.storage(number)
                return Break(phase, made.block, made.operator, made.shape, made.bytes, total)
        return None


def levels(log: StorageLog) -> Iterator[tuple[int, str, int]]:
    """Yields for every event its number, its phase, and the bytes allocated after it."""
    totals = itertools.accumulate(change for _, change in log.changes())
    yield from zip(itertools.count(), _phases(log), totals, strict=False)


def _phases(log: StorageLog) -> Iterator[str]:
    """The phase of every event."""
    for (start, phase), (end, _) in itertools.pairwise([*log.marks, (len(log.events), "")]):
        yield from itertools.repeat(phase, end - start)


def allocated_by_cause(
    changes: Iterable[tuple[str, int]], start: Mapping[str, int] | None = None
) -> Iterator[Counter[str]]:
    """Yields the allocated bytes by cause after every change; always the same object.

    Args:
        changes: Causes, and bytes that are allocated or (negative) freed; see `StorageLog.changes`.
        start: Bytes by cause before the first change.
    """
    allocated = Counter(start or {})
    for cause, change in changes:
        allocated[cause] += change
        yield allocated


def account(log: StorageLog, *, routed: bool = False) -> Simulation:
    """Finds the peak of each phase and the bytes allocated at that moment, by cause."""
    maxima: dict[str, tuple[int, int]] = {phase: (0, -1) for _, phase in log.marks}
    for number, phase, total in levels(log):
        if total > maxima[phase][0]:
            maxima[phase] = total, number
    phase_at = {number: phase for phase, (_, number) in maxima.items()}
    peaks: dict[str, Peak] = {}
    for number, allocated in enumerate(allocated_by_cause(log.changes())):
        if (phase := phase_at.get(number)) is not None:
            causes = {cause: size for cause, size in allocated.items() if size}
            made = log.storage(number)
            peaks[phase] = Peak(phase, sum(causes.values()), causes, made.block, made.operator)
    phases = tuple(peaks[phase] for phase in maxima if phase in peaks)
    return Simulation(phases, dict(log.flops), dict(log.moved), log, routed)
