"""8-bit numbers: a code for each, and the largest magnitude of every 256 of them.

Block-wise dynamic quantization (Dettmers et al. 2021, arXiv 2110.02861, sections 2.1 and 2.2).
"""

from __future__ import annotations

import itertools
import math
import struct
from bisect import bisect_left
from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK = 256


@cache
def dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 256 numbers of the codes, ascending: from -1 to 1 if signed, else from 0 to 1.

    Seven powers of ten; between two of them equally spaced numbers, twice as many as in the range below. The
    same as bitsandbytes (functional.create_dynamic_map).
    """
    positive: list[float] = []
    for power in range(7):
        parts = 2 ** (power if signed else power + 1)
        positive += [10.0 ** (power - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
    negative = [-number for number in reversed(positive)] if signed else []
    return (*negative, 0.0, *positive, 1.0)


@cache
def _middles(signed: bool) -> tuple[float, ...]:
    """The midpoint between each number of the map and the next."""
    numbers = dynamic_map(signed)
    return (*((low + high) / 2 for low, high in itertools.pairwise(numbers)), math.inf)


@cache
def _first_codes(signed: bool) -> bytearray:
    """For the upper half of the bits of a float: the code of the lowest number that begins with them."""
    lowest = (upper << 16 | (0xFFFF if upper >> 15 else 0) for upper in range(1 << 16))
    numbers = struct.unpack(f"{1 << 16}f", struct.pack(f"{1 << 16}I", *lowest))
    return bytearray(bisect_left(_middles(signed), number) for number in numbers)


def quantize_(
    codes: UInt8[Tensor, " n"], absmax: Float[Tensor, " blocks"], exact: Float[Tensor, " n"], *, signed: bool
) -> None:
    """Quantizes fp32 `exact` to the nearest codes and the magnitudes of the blocks; `exact` is overwritten.

    Numbers with the same upper bits have at most one midpoint among them, so the code is looked up and
    increased by one above that midpoint. On a CPU this is many times faster than a search (torch.bucketize).
    """
    blocks = exact.view(-1, BLOCK)
    absmax.copy_(torch.maximum(blocks.amax(1), -blocks.amin(1)))
    blocks.div_(absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
    upper = exact.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    first = torch.frombuffer(_first_codes(signed), dtype=torch.uint8).to(exact.device)
    codes.copy_(first.index_select(0, upper))
    del upper
    middles = torch.tensor(_middles(signed), device=exact.device)
    codes.add_(exact > middles.index_select(0, codes.int()))


def dequantized(
    codes: UInt8[Tensor, " n"], absmax: Float[Tensor, " blocks"], *, signed: bool
) -> Float[Tensor, " n"]:
    """The fp32 numbers of codes and magnitudes."""
    numbers = torch.tensor(dynamic_map(signed), device=codes.device)
    exact = numbers.index_select(0, codes.int())
    return exact.view(-1, BLOCK).mul_(absmax[:, None]).view(-1)
