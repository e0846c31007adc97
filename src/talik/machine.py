"""What a computer has: this one, looked up and measured, or one that is described; memory as it is used."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from talik.errors import UsageError
from talik.events import Notify, Said, silent
from talik.files import in_words, write_text
from talik.machine_description import complete_rates, described_fields
from talik.machine_rates import Rates, kept_file, matmul_rate, rates_here
from talik.system import (
    anonymous_bytes,
    free_memory,
    home_folder,
    limited_memory,
    processor_name,
    total_memory,
)

__all__ = [
    "Machine",
    "PeakMemory",
    "Rates",
    "choose_device",
    "described_machine",
    "device_memory",
    "hard_limit",
    "machine_text",
    "matmul_rate",
    "save_machine",
    "this_machine",
    "without_bf16",
]

HERE = "this machine"
PLANNED = ("cpu", "cuda")  # kinds of device for which the memory of a run can be planned
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


def without_bf16() -> bool:
    """Whether oneDNN, by which torch multiplies bf16 matrices on a CPU, finds no instructions for it here."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_device(name: str) -> torch.device:
    """The device called `name`; for "auto" the accelerator if a run on it can be planned, else the CPU."""
    accelerator = _accelerator()
    if name == "auto":
        return accelerator if accelerator and accelerator.type in PLANNED else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    kinds = ["cpu"] + ([accelerator.type] if accelerator else [])
    count = torch.accelerator.device_count() if device and device.type != "cpu" else 1
    if device is None or device.type not in kinds or (device.index or 0) >= count:
        raise UsageError(f"there is no device {name!r} here", remedy=f"There is: {', '.join(kinds)}.")
    return device if device.type != "cpu" else torch.device("cpu")  # cpu:0 is the same


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def this_machine(
    device: str = "auto", *, measure: bool = True, anew: bool = False, notify: Notify = silent
) -> Machine:
    """This computer, with rates that were measured now or are kept from an earlier time.

    `anew` measures in any case; without `measure` nothing is, and rates that are not kept are assumed.
    What is free is looked up now.
    """
    chosen, there = choose_device(device), _accelerator()
    if device == "auto" and there is not None and chosen.type != there.type:
        notify(Said("note", f"a run on {there} cannot be planned yet: {chosen} is chosen"))
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


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes free and in all; a CPU and Apple's GPUs use the RAM."""
    if device.type in ("cpu", "mps"):
        return free_memory(), total_memory()
    return torch.accelerator.get_memory_info(device)


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


def machine_text(machine: Machine) -> str:
    """A machine on one screen."""
    rates, on_cpu = machine.rates, machine.device == "cpu"
    where = f" in {home_folder()}" if machine.name == HERE else ""
    disk = "unknown" if machine.disk_free is None else f"{in_words(machine.disk_free)} free{where}"
    capability = ".".join(map(str, machine.compute_capability or ()))
    if machine.measured:
        source = f"measured, kept in {kept_file()}"
    else:
        source = "as described" if machine.name != HERE else "not measured"
    rows = [
        ("machine", machine.name),
        ("device", machine.device + (f", compute capability {capability}" if capability else "")),
        ("processor", machine.processor),
        ("threads", f"{machine.threads}"),
        ("memory", f"{in_words(machine.memory)}, {in_words(machine.free)} of it free"),
        *([] if on_cpu else [("RAM", f"{in_words(machine.ram)}, {in_words(machine.ram_free)} of it free")]),
        ("disk", disk),
        ("rates", source),
        *((f"  {dtype} matrices", f"{rate / 1e9:,.1f} GFLOP/s") for dtype, rate in rates.matmul.items()),
        ("  copy in memory", f"{rates.copy / 1e9:,.1f} GB/s, read plus written"),
        *([] if on_cpu else [("  copy to device", f"{rates.to_device / 1e9:,.1f} GB/s")]),
        ("  disk reads", f"{rates.disk_read / 1e9:,.2f} GB/s"),
        ("  disk writes", f"{rates.disk_write / 1e9:,.2f} GB/s, fsync included"),
        *(("note", note) for note in machine.notes),
    ]
    return "\n".join(f"{name:<17} {text}" for name, text in rows)


def hard_limit(device: torch.device, most: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """Inside, no more than `most` bytes are given out: of this process's memory, or of the device's.

    What it yields is to be called first, and now and then (`limited_memory`). UsageError where there is no
    such limit.
    """
    if device.type == "cuda":
        return _limited_share(min(1.0, most / torch.accelerator.get_memory_info(device)[1]), device.index)
    if device.type == "cpu" and sys.platform == "linux":
        return limited_memory(most)
    raise UsageError(
        f"--enforce: {sys.platform} sets no limit on {device.type} memory", remedy="Leave it out."
    )


@contextlib.contextmanager
def _limited_share(share: float, index: int | None) -> Iterator[Callable[[], None]]:
    torch.cuda.set_per_process_memory_fraction(share, index)
    try:
        yield lambda: None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


class PeakMemory:
    """Samples how much memory this process holds, in a thread; bytes.

    On a CPU: anonymous + shared anonymous memory, every 20 ms; on an accelerator: what its allocator gave
    out. `phases` has the peak of each phase that `phase(name)` began, `take()` the peak since the last one.
    """

    def __init__(self, device: torch.device, seconds: float = 0.02) -> None:
        self.phases: dict[str, int] = {}
        self._device, self._seconds = device, seconds
        self._now, self._sampled, self._peak, self._taken = "", 0, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="talik-memory")

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cpu":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.phase("")
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        pause = self._seconds
        while not self._stop.wait(pause):
            start = time.perf_counter()
            self._sampled = max(self._sampled, anonymous_bytes())
            pause = max(self._seconds, 20 * (time.perf_counter() - start))  # where the system takes its time

    def phase(self, name: str) -> int:
        """A phase begins, and the one before it ends, whose peak this returns."""
        self._look()
        if self._now:
            self.phases[self._now] = max(self._peak, self.phases.get(self._now, 0))
        peak, self._peak, self._now = self._peak, 0, name
        return peak

    def take(self) -> int:
        """The peak since the last call."""
        self._look()
        taken, self._taken = self._taken, 0
        return taken

    def _look(self) -> None:
        peak = self._since()
        self._peak, self._taken = max(peak, self._peak), max(peak, self._taken)

    def _since(self) -> int:
        """The peak since this was last asked for."""
        if self._device.type == "cpu":
            sampled, self._sampled = self._sampled, 0
            return max(sampled, anonymous_bytes())
        peak = torch.accelerator.max_memory_allocated(self._device)
        torch.accelerator.reset_peak_memory_stats(self._device)
        return peak
