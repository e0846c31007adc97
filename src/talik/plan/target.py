"""The target of a plan: a machine, the memory a run may take there, and its program."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from talik.base.errors import NoRoomError, UsageError
from talik.base.events import Notify, silent
from talik.base.system import anonymous_bytes, release_free_memory
from talik.kernels.bf16_matmul import bf16_as_fp32
from talik.machine.device import PLANNED
from talik.machine.machine import HERE, Machine, this_machine
from talik.simulate.account import Break, Peak, Simulation
from talik.simulate.cuda import replay

SLACK = 0.03  # share of the peak by which the process may exceed it
LEAST_SLACK = 64 << 20  # bytes
# RAM of Python with PyTorch and Transformers on another computer, in bytes: measured on Linux
# without CUDA; a guess with CUDA's libraries.
PROGRAM = {"cpu": 300 << 20, "cuda": 2 << 30}
# Bytes that they take in addition during a run: code of products, threads; measured.
LIBRARIES = 20 << 20


def slack_of(promise: int) -> int:
    """Bytes that a run may take above its planned peak: what a simulation does not see."""
    return max(int(SLACK * promise), LEAST_SLACK)


@dataclass(frozen=True, slots=True)
class Target:
    """A machine, and the bytes that a run may take of its memory, host RAM and disk.

    Attributes:
        program: RAM of the interpreter and the libraries.
    """

    machine: Machine
    memory: int
    ram: int
    disk: int | None
    program: int

    @property
    def on_cpu(self) -> bool:
        """True if the device's memory is the RAM."""
        return self.machine.device == "cpu"

    @property
    def most(self) -> int:
        """The highest peak that stays within the memory with its slack."""
        return min(int(self.memory / (1 + SLACK)), self.memory - LEAST_SLACK)

    def now(self) -> Target:
        """The target with the memory that the program takes after planning, on this machine."""
        here = self.machine.name == HERE
        if here:
            release_free_memory()
        return replace(self, program=max(self.program, anonymous_bytes() + LIBRARIES)) if here else self

    def kernels(self) -> AbstractContextManager[None]:
        """Inside the context, simulations use the device's kernels."""
        return bf16_as_fp32(self.machine.without_bf16) if self.on_cpu else replay.target(self.machine)

    def account(self, result: Simulation) -> tuple[tuple[Peak, ...], Break | None]:
        """The peak of each phase in the device's memory, and the first allocation that exceeds it.

        On a CPU including the program; on CUDA including the context, in pages of the allocator.
        """
        if not self.on_cpu:
            device = replay.on_cuda(result, self.machine)
            return device.phases, device.first_break(self.most)
        phases = tuple(
            replace(p, bytes=p.bytes + self.program, causes={"program": self.program, **p.causes})
            for p in result.phases
        )
        found = result.first_break(self.most - self.program)
        return phases, replace(found, total=found.total + self.program) if found else None

    def needed(self, promise: int) -> int:
        """The memory with which a peak fits."""
        return promise + slack_of(promise) + 1


def machine_here(device: str, notify: Notify = silent) -> Machine:
    """This machine; rates are not measured if the disk has no room for that."""
    try:
        return this_machine(device, notify=notify)
    except NoRoomError:
        return this_machine(device, measure=False)


def target_of(
    machine: Machine, *, memory: int | None = None, ram: int | None = None, disk: int | None = None
) -> Target:
    """The target on a machine, with the given limits in bytes, or all free memory.

    On a CPU, memory and RAM are the same; the smaller limit counts.

    Raises:
        UsageError: Runs on this device cannot be planned.
    """
    kind, here = machine.device.partition(":")[0], machine.name == HERE
    if kind not in PLANNED:
        raise UsageError(
            f"a run on {machine.device!r} cannot be planned yet", remedy="Plan for a CPU or for CUDA."
        )
    taken = anonymous_bytes() if here else 0
    program = taken + LIBRARIES if here else PROGRAM[kind]
    free = machine.ram_free + taken
    on_cpu = [size for size in (memory, ram) if size is not None] if kind == "cpu" else []
    most_ram = min(on_cpu, default=free if ram is None else ram)
    most = most_ram if kind == "cpu" else machine.free if memory is None else memory
    return Target(machine, most, most_ram, machine.disk_free if disk is None else disk, program)
