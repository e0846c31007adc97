"""The device of a run: choice, memory, and bf16 instructions of a CPU."""

from __future__ import annotations

import torch

from talik.base.errors import UsageError
from talik.base.system import free_memory, total_memory

PLANNED = ("cpu", "cuda")  # kinds of devices that runs can be planned for


def without_bf16() -> bool:
    """True if oneDNN, which multiplies bf16 matrices for PyTorch on a CPU, finds no instructions for bf16."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the accelerator if runs on it can be planned, else the CPU.

    Raises:
        UsageError: There is no such device.
    """
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
    return device if device.type != "cpu" else torch.device("cpu")  # cpu:0 is the same device


def accelerator_here() -> torch.device | None:
    """The accelerator of this machine, if there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def device_memory(device: torch.device) -> tuple[int, int]:
    """Free and total memory in bytes; a CPU and Apple GPUs use the RAM."""
    if device.type in ("cpu", "mps"):
        return free_memory(), total_memory()
    return torch.accelerator.get_memory_info(device)
