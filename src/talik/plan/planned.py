"""What planning came to: the way that was chosen, or came nearest, and why each other was not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from talik.base.files import format_bytes
from talik.plan.seconds import Seconds
from talik.plan.target import Target, slack_of
from talik.recipe.plan import Plan
from talik.simulate.account import Break, Peak, Simulation


@dataclass(frozen=True, slots=True)
class Refusal:
    """A way that does not fit: the bytes it takes (at least, where `simulated` is false), and why.

    `change` is an option with which it would.
    """

    way: dict[str, Any]
    peak_bytes: int
    reason: str
    change: str | None
    simulated: bool


@dataclass(frozen=True, slots=True)
class Change:
    """A single change with which the run fits: options of the command, and the peak with it, simulated."""

    options: str
    peak_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Planned:
    """What was chosen, or came nearest. Peaks are in bytes of the target's memory, `disk` in bytes by use.

    `least` is the peak where a router chooses all experts alike, for mixtures of experts: the real one lies
    between it and the peak. `breaks`, `ram_missing` and `disk_missing` say what does not fit.
    """

    plan: Plan
    target: Target
    phases: tuple[Peak, ...]
    simulation: Simulation
    seconds: Seconds
    disk: dict[str, int]
    assumed: str | None
    refused: tuple[Refusal, ...]
    breaks: Break | None
    ram_bytes: int
    least: int | None = None
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether memory, RAM and disk are enough."""
        return self.breaks is None and not self.disk_missing and not self.ram_missing

    @property
    def disk_bytes(self) -> int:
        """What the run writes to the disk at most."""
        return sum(self.disk.values())

    @property
    def disk_missing(self) -> int:
        """Bytes that the disk has too few."""
        disk = self.target.disk
        return 0 if disk is None else max(0, self.disk_bytes - disk)

    @property
    def ram_missing(self) -> int:
        """Bytes of RAM that are too few beside a device with its own memory."""
        return 0 if self.target.on_cpu else max(0, self.ram_bytes - self.target.ram)

    @property
    def peak(self) -> Peak:
        """The highest of all phases."""
        return max(self.phases, key=lambda peak: peak.bytes)

    @property
    def problem(self) -> str:
        """Why it does not fit, and by how much in the way that takes least of those known."""
        if self.breaks is not None:
            peak = self.changes[0].peak_bytes if self.changes else self.peak.bytes
            short = format_bytes(self.target.needed(peak) - self.target.memory)
            return f"no way to run this fits {format_bytes(self.target.memory)}: {short} are missing"
        lacking = {"RAM": self.ram_missing, "disk": self.disk_missing}
        return "; ".join(f"the {name} lacks {format_bytes(size)}" for name, size in lacking.items() if size)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
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
            "refused": [asdict(refusal) for refusal in self.refused],
            "changes": [asdict(change) for change in self.changes],
            "disk_bytes": self.disk_bytes,
            "seconds": asdict(self.seconds),
            "breaks": asdict(self.breaks) if self.breaks else None,
        }
