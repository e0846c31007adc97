"""Hard limits on the memory of this process or of its device."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch

from talik.base.errors import UsageError
from talik.base.system import limited_memory


def hard_limit(device: torch.device, most: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """Limits the memory of this process, or of the device, to `most` bytes while the context is entered.

    The yielded function must be called at the start and between phases (see `limited_memory`).

    Raises:
        UsageError: The system has no such limit.
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
