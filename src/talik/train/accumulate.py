"""Adds gradients to their fp32 sums. An operator of torch of its own: what it does slice by slice is one call
to whoever watches the operators.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Elements that are converted at once: half a MiB of fp32 stays in the heap and the cache, where a larger
# piece would be mapped anew each time, which takes five times as long (docs/log.md).
SLICE = 1 << 17

_library = torch.library.Library("talik", "DEF")
_library.define("accumulate_(Tensor(a!) whole, Tensor part) -> ()")


def accumulate_(whole: Float[Tensor, ...], part: Float[Tensor, ...]) -> None:
    """Adds a gradient to its fp32 sum, in place."""
    torch.ops.talik.accumulate_(whole, part)


def _accumulate_(whole: Tensor, part: Tensor) -> None:
    if whole.dtype == part.dtype or whole.device.type != "cpu":
        whole.add_(part)
        return
    for own, more in zip(whole.view(-1).split(SLICE), part.reshape(-1).split(SLICE), strict=True):
        own.add_(more)


def _fake(whole: Tensor, part: Tensor) -> None:
    pass


_library.impl("accumulate_", _accumulate_, "CompositeExplicitAutograd")
torch.library.register_fake("talik::accumulate_", _fake, lib=_library)


def converted(whole: Float[Tensor, ...], part: Float[Tensor, ...]) -> Float[Tensor, " n"] | None:
    """What it makes beside its operands on a CPU, for those who count memory; None if nothing."""
    if whole.dtype == part.dtype:
        return None
    return torch.empty(min(SLICE, whole.numel()), dtype=whole.dtype)
