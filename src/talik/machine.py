"""What this computer has: the device of a run, its threads, and memory as it is used."""

from __future__ import annotations

import threading
import time

import torch

from talik.errors import UsageError
from talik.system import anonymous_bytes


def choose_device(name: str) -> torch.device:
    """The device called `name`; for "auto" the accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    kinds = ["cpu"] + ([accelerator.type] if accelerator else [])
    if device is None or device.type not in kinds:
        raise UsageError(f"there is no device {name!r} here", remedy=f"There is: {', '.join(kinds)}.")
    return device


class PeakMemory:
    """Samples how much memory this process holds, in a thread; `take()` is the peak since the last one.

    On a CPU: anonymous + shared anonymous memory, every 20 ms; on an accelerator: what its allocator gave
    out. Bytes.
    """

    def __init__(self, device: torch.device, seconds: float = 0.02) -> None:
        self._device, self._seconds = device, seconds
        self._peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="talik-memory")

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cpu":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._seconds):
            self._peak = max(self._peak, anonymous_bytes())

    def take(self) -> int:
        """The peak since the last call, in bytes."""
        if self._device.type == "cpu":
            sampled, self._peak = self._peak, 0
            return max(sampled, anonymous_bytes())
        peak = torch.accelerator.max_memory_allocated(self._device)
        torch.accelerator.reset_peak_memory_stats(self._device)
        return peak


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 512) -> float:
    """Floating-point operations a second of a matrix product, the best of four; under 0.3 s on slow CPUs."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
