"""What a computer has: this one, looked up and measured, or one that is described; memory as it is used."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from talik.base.events import Notify, Status, silent
from talik.base.files import write_text
from talik.base.system import (
    free_memory,
    home_folder,
    processor_name,
    total_memory,
)
from talik.machine.description import complete_rates, described_fields
from talik.machine.device import accelerator_here, choose_device, device_memory, without_bf16
from talik.machine.rates import Rates, rates_here

HERE = "this machine"
_SAVED = """# A machine, for --machine FILE. Sizes in bytes, or as 24GiB or 24GB; rates in FLOP/s and bytes/s.
# Only device and memory must be there; what is left out is assumed, and said.
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """A computer as a plan sees it: one device with its memory, the RAM, the disk, and how fast they are."""

    name: str  # "this machine", a name of the table, or the file's own
    device: str  # "cpu", "cuda", "mps", ...
    processor: str  # what the device calls itself
    threads: int  # of the CPU's kernels
    memory: int  # bytes of the device's memory (RAM on a CPU), in all
    free: int  # ... and free now
    ram: int  # bytes in all, or the lowest limit on this process
    ram_free: int  # ... and free now
    disk_free: int | None  # bytes, where the caches are kept
    compute_capability: tuple[int, int] | None
    rates: Rates
    measured: bool  # False for one that is described
    notes: tuple[str, ...] = ()  # what was assumed, and the sources of a described one's numbers

    @property
    def without_bf16(self) -> bool:
        """Whether it is a CPU that has no instructions for bf16; of a described one its rates tell."""
        if self.device != "cpu":
            return False
        if self.name == HERE:
            return without_bf16()
        return self.rates.matmul["bf16"] < self.rates.matmul["fp32"] / 2


def this_machine(
    device: str = "auto", *, measure: bool = True, anew: bool = False, notify: Notify = silent
) -> Machine:
    """This computer, with rates that were measured now or are kept from an earlier time.

    `anew` measures in any case; without `measure` nothing is, and rates that are not kept are assumed.
    What is free is looked up now.
    """
    chosen, there = choose_device(device), accelerator_here()
    if device == "auto" and there is not None and chosen.type != there.type:
        notify(Status("note", f"a run on {there} cannot be planned yet: {chosen} is chosen"))
    processor = _processor(chosen)
    rates = rates_here(chosen, processor, measure=measure, anew=anew, notify=notify)
    free, memory = device_memory(chosen)
    threads, notes = torch.get_num_threads(), []
    if rates is None:
        fields: dict[str, Any] = {}
        notes = complete_rates(fields, chosen.type, processor, threads)
        rates = Rates(**fields)
    return Machine(
        name=HERE,
        device=str(chosen),
        processor=processor,
        threads=threads,
        memory=memory,
        free=min(free, memory),
        ram=total_memory(),
        ram_free=free_memory(),
        disk_free=_disk_free(home_folder()),
        compute_capability=_capability(chosen),
        rates=rates,
        measured=not notes,
        notes=tuple(notes),
    )


def _processor(device: torch.device) -> str:
    if device.type != "cpu":
        with contextlib.suppress(AttributeError):  # not every kind of device says its name
            return torch.get_device_module(device).get_device_name(device)
    return processor_name()


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _disk_free(folder: Path) -> int:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def described_machine(name_or_file: str) -> Machine:
    """The machine that a YAML file describes, or an ordinary one with a GPU of the table.

    UsageError with all wrong fields at once, or with the table's names for one that is unknown.
    """
    fields = described_fields(name_or_file)
    return Machine(**{**fields, "rates": Rates(**fields["rates"]), "measured": False})


def save_machine(machine: Machine, file: Path) -> None:
    """Writes a machine as YAML that `described_machine` reads back; "this machine" takes the file's name."""
    fields = asdict(machine)
    del fields["measured"], fields["notes"]
    if machine.name == HERE:
        del fields["name"]
    if machine.compute_capability:
        fields["compute_capability"] = list(machine.compute_capability)
    written = {name: value for name, value in fields.items() if value is not None}
    write_text(file, _SAVED + yaml.safe_dump(written, sort_keys=False, allow_unicode=True))
