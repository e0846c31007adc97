"""PyTorch operators that work in pieces but are one call for tools that record operators.

On a CPU, memory for a large result is mapped each time, which takes several times as long as filling it
(docs/log.md). Pieces are small enough for the heap and the CPU cache, or are allocated once and reused.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

SLICE = 1 << 17  # elements of a gradient converted at once: half a MiB of fp32
ROWS = 1 << 19  # logits processed at once; at least one row per thread

_library = torch.library.Library("talik", "DEF")
_library.define("accumulate_(Tensor(a!) whole, Tensor part) -> ()")
_library.define("cross_entropy(Tensor logits, Tensor targets, int divisor, Tensor(a!)? gradient) -> Tensor")


def accumulate_(whole: Float[Tensor, ...], part: Float[Tensor, ...]) -> None:
    """Adds a gradient to its fp32 sum, in place."""
    torch.ops.talik.accumulate_(whole, part)


def cross_entropy(
    logits: Float[Tensor, "rows vocabulary"],
    targets: Int[Tensor, " rows"],
    divisor: int = 1,
    gradient: Float[Tensor, "rows vocabulary"] | None = None,
) -> Float[Tensor, ""]:
    """The sum of -log softmax(logits) at the targets, divided by `divisor`; computed and returned in fp32.

    The gradient with respect to the logits, softmax minus one-hot, is written to `gradient` if it is given.
    """
    return torch.ops.talik.cross_entropy(logits, targets, divisor, gradient)


def _accumulate_(whole: Tensor, part: Tensor) -> None:
    if whole.dtype == part.dtype or whole.device.type != "cpu":
        whole.add_(part)
        return
    for own, more in zip(whole.view(-1).split(SLICE), part.reshape(-1).split(SLICE), strict=True):
        own.add_(more)


def _cross_entropy(logits: Tensor, targets: Tensor, divisor: int, gradient: Tensor | None) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    given, chances = torch.empty(_pieces(logits, logits.device.type), device=logits.device)
    rows = len(given)
    for start in range(0, len(logits), rows):
        place = slice(start, start + rows)
        part, at = logits[place], targets[place, None]
        out = chances[: len(part)]
        torch.ops.aten._log_softmax.out(given[: len(part)].copy_(part), -1, False, out=out)
        total -= out.gather(1, at).sum()
        if gradient is not None:
            out.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=out.dtype))
            gradient[place].copy_(out.mul_(1 / divisor))
    return total / divisor


def _pieces(logits: Tensor, device: str) -> tuple[int, int, int]:
    """The workspace of `_cross_entropy`: logits and softmax of a few rows in fp32; of all rows on an
    accelerator.
    """
    rows, vocabulary = logits.shape
    if device == "cpu":
        rows = min(rows, max(torch.get_num_threads(), ROWS // vocabulary))
    return 2, max(rows, 1), vocabulary


def workspace(operator: Any, args: tuple[Any, ...], device: str) -> list[Tensor]:
    """The workspace of an operator on a kind of device, on the meta device: for memory simulation."""
    if operator is torch.ops.talik.accumulate_.default:
        whole, part = args
        unlike = whole.dtype != part.dtype and device == "cpu"
        return [torch.empty(min(SLICE, whole.numel()), device="meta")] if unlike else []
    if operator is torch.ops.talik.cross_entropy.default:
        return [torch.empty(_pieces(args[0], device), device="meta")]
    return []


_library.impl("accumulate_", _accumulate_, "CompositeExplicitAutograd")
_library.impl("cross_entropy", _cross_entropy, "CompositeExplicitAutograd")


@torch.library.register_fake("talik::accumulate_", lib=_library)
def _(whole: Tensor, part: Tensor) -> None:
    pass


@torch.library.register_fake("talik::cross_entropy", lib=_library)
def _(logits: Tensor, targets: Tensor, divisor: int, gradient: Tensor | None) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)
