"""Numbers of 8 bits: a code for each, and for every 256 of them the largest magnitude among them.

Block-wise dynamic quantisation of Dettmers et al. 2021, arXiv 2110.02861 (sections 2.1 and 2.2).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK = 256


@cache
def dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 256 numbers that codes stand for, rising: from -1 to 1 if signed, else from 0 to 1.

    Seven powers of ten; between each and the next, numbers in the middle of equal parts, twice as many as
    below it. As bitsandbytes has them (functional.create_dynamic_map).
    """
    positive: list[float] = []
    for power in range(7):
        parts = 2 ** (power if signed else power + 1)
        positive += [10.0 ** (power - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
    negative = [-number for number in reversed(positive)] if signed else []
    return (*negative, 0.0, *positive, 1.0)


def quantize_(
    codes: UInt8[Tensor, " n"], absmax: Float[Tensor, " blocks"], exact: Float[Tensor, " n"], *, signed: bool
) -> None:
    """Writes fp32 `exact` as the nearest codes and the blocks' magnitudes; `exact` is used up."""
    blocks = exact.view(-1, BLOCK)
    absmax.copy_(torch.maximum(blocks.amax(1), -blocks.amin(1)))
    blocks.div_(absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
    numbers = _numbers(signed, exact.device)
    codes.copy_(torch.bucketize(exact, (numbers[1:] + numbers[:-1]) / 2, out_int32=True))


def dequantized(
    codes: UInt8[Tensor, " n"], absmax: Float[Tensor, " blocks"], *, signed: bool
) -> Float[Tensor, " n"]:
    """The fp32 numbers that codes and magnitudes stand for."""
    exact = F.embedding(codes.int(), _numbers(signed, codes.device)[:, None])
    return exact.view(-1, BLOCK).mul_(absmax[:, None]).view(-1)


def _numbers(signed: bool, device: torch.device) -> Float[Tensor, " 256"]:
    """Made anew each time: a tensor that was kept from a simulated run would be fake."""
    return torch.tensor(dynamic_map(signed), device=device)
