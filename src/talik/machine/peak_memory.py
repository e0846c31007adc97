"""Samples the peak memory of this process or of its device during a run."""

from __future__ import annotations

import threading
import time

import torch

from talik.base.system import anonymous_bytes


class PeakMemory:
    """Samples the memory of this process in a thread, in bytes.

    On a CPU: anonymous and shared anonymous memory, every 20 ms. On an accelerator: bytes allocated by
    PyTorch.

    Attributes:
        phases: The peak of each phase that `phase` has started.
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
            pause = max(self._seconds, 20 * (time.perf_counter() - start))  # reading the value may be slow

    def phase(self, name: str) -> int:
        """Starts a phase, and returns the peak of the previous one."""
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
        """The peak since the last call of this function."""
        if self._device.type == "cpu":
            sampled, self._sampled = self._sampled, 0
            return max(sampled, anonymous_bytes())
        peak = torch.accelerator.max_memory_allocated(self._device)
        torch.accelerator.reset_peak_memory_stats(self._device)
        return peak
