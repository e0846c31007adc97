"""Evaluates a log of storages: the peak of each phase, its causes, and the first allocation over a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
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
                made = self.log.births[self.log.events[number]]
                return Break(phase, made.block, made.operator, made.shape, made.bytes, total)
        return None


def levels(log: StorageLog) -> Iterator[tuple[int, str, int]]:
    """Yields for every event its number, its phase, and the bytes allocated after it."""
    total, marks = 0, iter([*log.marks[1:], (len(log.events) + 1, "")])
    phase, (until, following) = log.marks[0][1], next(marks)
    for number, event in enumerate(log.events):
        while number >= until:
            phase, (until, following) = following, next(marks)
        total += log.births[event].bytes if event >= 0 else -log.births[~event].bytes
        yield number, phase, total


def account(log: StorageLog, *, routed: bool = False) -> Simulation:
    """Finds the peak of each phase and the bytes allocated at that moment, by cause."""
    highest: dict[str, tuple[int, int]] = {phase: (0, -1) for _, phase in log.marks}
    for number, phase, total in levels(log):
        if total > highest[phase][0]:
            highest[phase] = total, number
    wanted = {number: phase for phase, (_, number) in highest.items()}
    alive: Counter[str] = Counter()
    peaks = {}
    for number, event in enumerate(log.events):
        made = log.births[event if event >= 0 else ~event]
        alive[made.cause or "workspace"] += made.bytes if event >= 0 else -made.bytes
        if number in wanted:
            causes = {cause: size for cause, size in alive.items() if size}
            peaks[wanted[number]] = Peak(
                wanted[number], sum(causes.values()), causes, made.block, made.operator
            )
    phases = tuple(peaks[phase] for phase in highest if phase in peaks)
    return Simulation(phases, dict(log.flops), dict(log.moved), log, routed)
