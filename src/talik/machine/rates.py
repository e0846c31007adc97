"""The speed of this computer: matrix products, copies, disk. Measured once, in seconds, and kept."""

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
PIECE = 32 << 20  # bytes per write or read
PIECES = 8  # pieces of the file at most: 256 MiB
COPY_BYTES = 128 << 20  # more than common CPU caches hold
LONG_ENOUGH = 0.02  # seconds a product must take to be measured
SECONDS = 0.5  # of repetition; the best time counts, as other programs only slow it down


@dataclass(frozen=True, slots=True)
class Rates:
    """The speed of a machine, measured or described."""

    matmul: dict[str, float]  # FLOP/s of a matrix product, by dtype: "fp32", "bf16"
    copy: float  # bytes/s of device memory, read plus written, while copying
    to_device: float  # bytes/s from host RAM to the device (equal to copy on a CPU)
    disk_read: float  # bytes/s, bypassing the page cache if the system allows it
    disk_write: float  # bytes/s, fsync included


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """FLOP/s of a product of square matrices, the best of several.

    `size` rows, or fewer (128, 256, ...) if these already take long enough to measure: a processor with 1
    GFLOP/s also answers within a second.
    """
    rows = min(128, size)
    while True:
        a, b = (torch.ones(rows, rows, dtype=dtype, device=device) for _ in range(2))
        product = partial(_product, a, b)
        if (
            rows >= size or _best(product, SECONDS / 5) > LONG_ENOUGH
        ):  # repeated, because other programs run as well
            return 2 * rows**3 / _best(product)
        rows = min(2 * rows, size)


def _product(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a @ b)[0, 0].item()  # reading a value waits for the device


def measure_device(device: torch.device) -> dict[str, Any]:
    """Measures matrix products and copies, as fields of `Rates`; about 2 s."""
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
    """Measures reads and writes of an unnamed new file in `folder`, as fields of `Rates`; about 1 s.

    Raises:
        NoRoomError: The disk is full.
    """
    need_room(folder, PIECES * PIECE, "measuring the disk")
    folder.mkdir(parents=True, exist_ok=True)
    piece, buffer = os.urandom(PIECE), bytearray(PIECE)  # random data, because some disks compress
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
    """Durations of `work` in seconds: at least two, until `seconds` are over or there are `most`."""
    seconds = SECONDS if seconds is None else seconds
    start, times = time.perf_counter(), []
    while len(times) < most and (len(times) < 2 or time.perf_counter() - start < seconds):
        began = time.perf_counter()
        work()
        times.append(max(time.perf_counter() - began, 1e-9))
    return times


def kept_file() -> Path:
    """The file of measured rates, each with the facts it depends on."""
    return home_folder() / "machine.json"


def rates_here(
    device: torch.device, processor: str, *, measure: bool, anew: bool, notify: Notify
) -> Rates | None:
    """The rates of a device and of the disk with Talik's folder.

    Args:
        device: The device.
        processor: Its model name.
        measure: Measure unknown rates; otherwise None is returned if one is unknown.
        anew: Measure even if rates are known.
        notify: Gets the events.
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
    """Identifies the disk of a folder by number and size: a folder may move, and numbers may be reused."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return f"disk {there.stat().st_dev}; {shutil.disk_usage(there).total} bytes"


def _kept() -> dict[str, dict[str, Any]]:
    """The content of the file; damaged entries count as missing."""
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
