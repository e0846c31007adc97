"""A machine: this computer, measured, or another one, described."""

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
    """A computer for planning: one device with its memory, host RAM, disk, and their rates."""

    name: str  # "this machine", a GPU of the table, or the name in the file
    device: str  # "cpu", "cuda", "mps", ...
    processor: str  # model name of the device
    threads: int  # threads of CPU kernels
    memory: int  # bytes of device memory in all (RAM on a CPU)
    free: int  # ... and free now
    ram: int  # bytes in all, or the lowest limit on this process
    ram_free: int  # ... and free now
    disk_free: int | None  # bytes free on the disk of the caches
    compute_capability: tuple[int, int] | None
    rates: Rates
    measured: bool  # False for a described machine
    notes: tuple[str, ...] = ()  # assumed values, and the sources of described ones

    @property
    def without_bf16(self) -> bool:
        """True for a CPU without bf16 instructions; for a described one, its rates decide."""
        if self.device != "cpu":
            return False
        if self.name == HERE:
            return without_bf16()
        return self.rates.matmul["bf16"] < self.rates.matmul["fp32"] / 2


def this_machine(
    device: str = "auto", *, measure: bool = True, anew: bool = False, notify: Notify = silent
) -> Machine:
    """This computer, with measured rates.

    Args:
        device: A device, or "auto".
        measure: Measure rates that are not known from an earlier time; otherwise they are assumed.
        anew: Measure even if rates are known.
        notify: Gets the events.
    """
    chosen, there = choose_device(device), accelerator_here()
    if device == "auto" and there is not None and chosen.type != there.type:
        notify(Status("note", f"runs on {there} cannot be planned yet: {chosen} is used"))
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
        with contextlib.suppress(AttributeError):  # not every kind of device has a name
            return torch.get_device_module(device).get_device_name(device)
    return processor_name()


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _disk_free(folder: Path) -> int:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def described_machine(name_or_file: str) -> Machine:
    """The machine that a YAML file describes, or an ordinary one with a GPU of the table.

    Raises:
        UsageError: Fields are wrong, or the GPU is unknown; the error names all wrong fields, or the known
            GPUs.
    """
    fields = described_fields(name_or_file)
    return Machine(**{**fields, "rates": Rates(**fields["rates"]), "measured": False})


def save_machine(machine: Machine, file: Path) -> None:
    """Writes a machine as YAML for `described_machine`; "this machine" is named after the file."""
    fields = asdict(machine)
    del fields["measured"], fields["notes"]
    if machine.name == HERE:
        del fields["name"]
    if machine.compute_capability:
        fields["compute_capability"] = list(machine.compute_capability)
    written = {name: value for name, value in fields.items() if value is not None}
    write_text(file, _SAVED + yaml.safe_dump(written, sort_keys=False, allow_unicode=True))
