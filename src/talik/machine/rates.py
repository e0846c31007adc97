"""How fast this computer is: matrix products, copies, its disk. Measured once, in seconds, and kept."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from talik.base.events import Notify, Status
from talik.base.files import need_room, read_json, write_json
from talik.base.system import can_drop_pages, drop_pages, free_memory, home_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PIECE = 32 << 20  # bytes written, or read, at once
PIECES = 8  # of the file at most: 256 MiB
COPY_BYTES = 128 << 20  # more than the caches of common processors hold
LONG_ENOUGH = 0.02  # seconds of a product whose rate counts
SECONDS = 0.5  # for which one thing is repeated; the best counts, as other programs only slow it down


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a machine is: measured, or as it is described."""

    matmul: dict[str, float]  # FLOP/s of a matrix product by dtype: "fp32", "bf16"
    copy: float  # bytes/s that the device's memory reads plus writes while copying
    to_device: float  # bytes/s from RAM to the device (the same as copy on a CPU)
    disk_read: float  # bytes/s, not from the page cache where a system lets a program avoid it
    disk_write: float  # bytes/s, fsync included


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Floating-point operations a second of a product of square matrices, the best of several.

    Of matrices with `size` rows, or of the first smaller ones (128, 256, ...) that take long enough to tell:
    a processor that does 1 GFLOP/s answers in a second, too.
    """
    rows = min(128, size)
    while True:
        a, b = (torch.ones(rows, rows, dtype=dtype, device=device) for _ in range(2))
        product = partial(_product, a, b)
        if rows >= size or _best(product, SECONDS / 5) > LONG_ENOUGH:  # again and again: others run, too
            return 2 * rows**3 / _best(product)
        rows = min(2 * rows, size)


def _product(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b)[0, 0].item()  # reading a value waits for the device


def measure_device(device: torch.device) -> dict[str, Any]:
    """Matrix products and copies, as fields of `Rates`; about 2 s."""
    size = 2048 if device.type == "cpu" else 4096
    matmul = {name: matmul_rate(dtype, device, size) for name, dtype in DTYPES.items()}
    count = min(COPY_BYTES, free_memory() // 8)
    source, target = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
    copy = 2 * count / _best(lambda: target.copy_(source)[-1].item())
    if device.type == "cpu":
        return {"matmul": matmul, "copy": copy, "to_device": copy}
    host = torch.ones(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return {
        "matmul": matmul,
        "copy": copy,
        "to_device": count / _best(lambda: target.copy_(host)[-1].item()),
    }


def measure_disk(folder: Path) -> dict[str, float]:
    """Reads and writes of a new file without a name in `folder`, as fields of `Rates`; about 1 s.

    NoRoomError where the disk is full.
    """
    need_room(folder, PIECES * PIECE, "measuring the disk")
    folder.mkdir(parents=True, exist_ok=True)
    piece, buffer = os.urandom(PIECE), bytearray(PIECE)  # random: some disks compress
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def write() -> None:
            file.write(piece)
            os.fsync(file.fileno())

        written = _times(write, PIECES)
        file.seek(0)
        drop_pages(file.fileno(), 0, 0)
        read = _times(lambda: file.readinto(buffer), len(written))
    return {"disk_read": PIECE / min(read), "disk_write": PIECE / min(written)}


def _best(work: Callable[[], Any], seconds: float | None = None) -> float:
    return min(_times(work, 1000, seconds))


def _times(work: Callable[[], Any], most: int, seconds: float | None = None) -> list[float]:
    """How long `work` takes, in seconds: two times, and more until `seconds` are over or `most` are done."""
    seconds = SECONDS if seconds is None else seconds
    start, times = time.perf_counter(), []
    while len(times) < most and (len(times) < 2 or time.perf_counter() - start < seconds):
        began = time.perf_counter()
        work()
        times.append(max(time.perf_counter() - began, 1e-9))
    return times


def kept_file() -> Path:
    """Where measured rates are kept, each under what it depends on."""
    return home_folder() / "machine.json"


def rates_here(
    device: torch.device, processor: str, *, measure: bool, anew: bool, notify: Notify
) -> Rates | None:
    """The kept rates of a device and of the disk with Talik's folder; what is not kept is measured.

    `anew` measures in any case. Without `measure` None stands for what is not kept.
    """
    folder, kept = home_folder(), _kept()
    todo: dict[str, Callable[[], dict[str, Any]]] = {
        _device_key(device, processor): lambda: measure_device(device),
        _disk_key(folder): lambda: measure_disk(folder),
    }
    missing = [key for key in todo if anew or key not in kept]
    if missing and not measure:
        return None
    if missing:
        notify(Status("machine", f"is measured, in a few seconds; kept in {kept_file()}"))
        if not can_drop_pages():
            notify(
                Status("note", "this system may read the measured file from memory: disk reads look faster")
            )
        new = {key: todo[key]() for key in missing}
        kept = {**_kept(), **new}
        write_json(kept_file(), kept)
    fields = {name: value for key in todo for name, value in kept[key].items()}
    return Rates(**fields)


def _device_key(device: torch.device, processor: str) -> str:
    return f"{processor}; {device.type}; {torch.get_num_threads()} threads; torch {torch.__version__}"


def _disk_key(folder: Path) -> str:
    """The disk that holds a folder, by its number and size: a folder may move, and numbers are given anew."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return f"disk {there.stat().st_dev}; {shutil.disk_usage(there).total} bytes"


def _kept() -> dict[str, dict[str, Any]]:
    """What the file keeps; what somebody broke in it counts as not kept."""
    try:
        kept = read_json(kept_file())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in kept.items() if _whole(value)} if isinstance(kept, dict) else {}


def _whole(entry: Any) -> bool:
    names = list(Rates.__dataclass_fields__)
    if not isinstance(entry, dict) or sorted(entry) not in (sorted(names[:3]), sorted(names[3:])):
        return False
    matmul = entry.get("matmul", dict.fromkeys(DTYPES, 1.0))
    if not isinstance(matmul, dict) or set(matmul) != set(DTYPES):
        return False
    numbers = [*matmul.values(), *(value for name, value in entry.items() if name != "matmul")]
    return all(isinstance(number, float) and number > 0 for number in numbers)
