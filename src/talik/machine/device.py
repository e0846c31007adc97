"""The device of a run: which there are, how much memory it has, and whether a CPU has bf16 instructions."""

from __future__ import annotations

import torch

from talik.base.errors import UsageError
from talik.base.system import free_memory, total_memory

PLANNED = ("cpu", "cuda")  # kinds of device for which the memory of a run can be planned


def without_bf16() -> bool:
    """Whether oneDNN, by which torch multiplies bf16 matrices on a CPU, finds no instructions for it here."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_device(name: str) -> torch.device:
    """The device called `name`; for "auto" the accelerator if a run on it can be planned, else the CPU."""
    accelerator = accelerator_here()
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


def accelerator_here() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes free and in all; a CPU and Apple's GPUs use the RAM."""
    if device.type in ("cpu", "mps"):
        return free_memory(), total_memory()
    return torch.accelerator.get_memory_info(device)
