"""The result of planning: the chosen way, or the nearest, and why the others were refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from talik.base.files import format_bytes
from talik.plan.seconds import Seconds
from talik.plan.target import Target, slack_of
from talik.plan.ways import Way
from talik.recipe.plan import Plan
from talik.simulate.account import Break, Peak, Simulation, highest

NOT_COMPARED = "an estimate: planned peaks of CUDA devices have not been compared with a device yet"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A way that does not fit.

    Attributes:
        peak_bytes: Its peak; a lower bound if `simulated` is false.
        reason: Why it does not fit.
        change: An option with which it would fit.
    """

    way: Way
    peak_bytes: int
    reason: str
    change: str | None
    simulated: bool

    def as_dict(self) -> dict[str, Any]:
        """All values, for JSON."""
        return {**asdict(self), "way": self.way.as_dict()}


@dataclass(frozen=True, slots=True)
class Change:
    """A single change with which the run fits: options of the command, and the simulated peak with it."""

    options: str
    peak_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Planned:
    """The result of planning. Peaks are bytes of the target's memory, `disk` is bytes by use.

    Attributes:
        least: For mixtures of experts, the peak if the router chooses all experts equally often. The planned
            peak is for a router that always chooses the same experts; the real one is in between.
        checkpoints: The most checkpoints on disk at once: those to keep, the best, and one being written.
        breaks: The first allocation that exceeds the memory.
        ram_missing: Bytes of host RAM that are missing.
        disk_missing: Bytes of disk that are missing.
    """

    plan: Plan
    target: Target
    phases: tuple[Peak, ...]
    simulation: Simulation
    seconds: Seconds
    disk: dict[str, int]
    checkpoints: int
    assumed: str | None
    refused: tuple[Refusal, ...]
    breaks: Break | None
    ram_bytes: int
    least: int | None = None
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool:
        """True if memory, host RAM and disk are sufficient."""
        return self.breaks is None and not self.disk_missing and not self.ram_missing

    @property
    def disk_bytes(self) -> int:
        """The most bytes that the run writes to disk."""
        return sum(self.disk.values())

    @property
    def disk_missing(self) -> int:
        """Bytes of disk that are missing."""
        disk = self.target.disk
        return 0 if disk is None else max(0, self.disk_bytes - disk)

    @property
    def ram_missing(self) -> int:
        """Bytes of host RAM that are missing, on a device with its own memory."""
        return 0 if self.target.on_cpu else max(0, self.ram_bytes - self.target.ram)

    @property
    def peak(self) -> Peak:
        """The highest peak of all phases."""
        return highest(self.phases)

    @property
    def problem(self) -> str:
        """Why the run does not fit, and how much is missing in the known way with the lowest peak."""
        if self.breaks is not None:
            peak = self.changes[0].peak_bytes if self.changes else self.peak.bytes
            short = format_bytes(self.target.needed(peak) - self.target.memory)
            return f"no way to run this fits {format_bytes(self.target.memory)}: {short} are missing"
        lacking = {"RAM": self.ram_missing, "disk": self.disk_missing}
        return "; ".join(f"the {name} lacks {format_bytes(size)}" for name, size in lacking.items() if size)

    @property
    def estimate(self) -> str | None:
        """A note if the planned memory has never been compared with a device of this kind."""
        return None if self.target.on_cpu else NOT_COMPARED

    def as_dict(self) -> dict[str, Any]:
        """All values, for JSON."""
        return {
            "fits": self.fits,
            "machine": self.target.machine.name,
            "budget_bytes": self.target.memory,
            "slack_bytes": slack_of(self.peak.bytes),
            "peak_bytes": {"ram": self.ram_bytes} | {self.plan.device: self.peak.bytes},
            "least_peak_bytes": self.least,
            "phases": [
                {"name": p.phase, "peak_bytes": p.bytes, "causes": p.causes, "block": p.block}
                for p in self.phases
            ],
            "chosen": self.plan.model_dump() if self.fits else None,
            "assumed": self.assumed,
            "estimate": self.estimate,
            "refused": [refusal.as_dict() for refusal in self.refused],
            "changes": [asdict(change) for change in self.changes],
            "disk_bytes": self.disk_bytes,
            "seconds": asdict(self.seconds),
            "breaks": asdict(self.breaks) if self.breaks else None,
        }
