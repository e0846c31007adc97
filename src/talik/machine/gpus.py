"""GPUs that can be planned for without having one: the numbers of their datasheets, with sources.

Rates are dense (without sparsity); bf16 rates are those of tensor cores that accumulate in fp32. They are
peaks: measured matrix products reach 70 to 98 % of them. Memory is the value shown by nvidia-smi, which is
below the nominal one if error correction takes a part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GA102 = "NVIDIA Ampere GA102 GPU architecture whitepaper v2, 2021"
ADA = "NVIDIA Ada GPU architecture whitepaper v2, 2023"
BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, 2025"
PRODUCT = (
    "SMs and boost clock of NVIDIA's product page, {} x 512 FLOP a clock and SM (whitepapers of GA102, Ada)"
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU in the units of its datasheet."""

    memory: int  # MiB
    fp32: float  # TFLOP/s without tensor cores, as PyTorch computes fp32 by default
    bf16: float  # TFLOP/s
    bandwidth: int  # GB/s of its memory
    pcie: int  # GB/s from host RAM, one direction
    capability: tuple[int, int]
    source: str


GPUS = {
    "RTX 3060 12GB": Gpu(12288, 12.7, 25.5, 360, 32, (8, 6), PRODUCT.format("28 x 1.777 GHz")),
    "RTX 3080 10GB": Gpu(10240, 29.8, 59.5, 760, 32, (8, 6), GA102),
    "RTX 3090": Gpu(24576, 35.6, 71.0, 936, 32, (8, 6), GA102),
    "RTX 4060 Ti 16GB": Gpu(16380, 22.1, 44.1, 288, 16, (8, 9), PRODUCT.format("34 x 2.535 GHz")),
    "RTX 4070": Gpu(12282, 29.1, 58.3, 504, 32, (8, 9), PRODUCT.format("46 x 2.475 GHz")),
    "RTX 4080": Gpu(16376, 48.7, 97.5, 717, 32, (8, 9), ADA),
    "RTX 4090": Gpu(24564, 82.6, 165.2, 1008, 32, (8, 9), ADA),
    "RTX 5080": Gpu(16303, 56.3, 112.6, 960, 64, (12, 0), BLACKWELL),
    "RTX 5090": Gpu(32607, 104.8, 209.5, 1792, 64, (12, 0), BLACKWELL),
    "RTX A6000": Gpu(49140, 38.7, 154.8, 768, 32, (8, 6), GA102),
    # Turing's tensor cores (65 TFLOP/s in fp16) have no bf16; its products run at the fp32 rate at best
    "T4": Gpu(15360, 8.1, 8.1, 300, 16, (7, 5), "NVIDIA T4 datasheet, 2019"),
    "L4": Gpu(23034, 30.3, 121.0, 300, 32, (8, 9), "NVIDIA L4 datasheet, 2023"),
    "L40S": Gpu(46068, 91.6, 362.0, 864, 32, (8, 9), "NVIDIA L40S datasheet, 2023"),
    "A10": Gpu(23028, 31.2, 125.0, 600, 32, (8, 6), "NVIDIA A10 datasheet, 2021"),
    "A100 40GB": Gpu(40960, 19.5, 312.0, 1555, 32, (8, 0), "NVIDIA A100 datasheet, 2020"),
    "A100 80GB": Gpu(81920, 19.5, 312.0, 1935, 32, (8, 0), "NVIDIA A100 datasheet (PCIe), 2021"),
    "H100 PCIe": Gpu(81559, 51.0, 756.0, 2000, 64, (9, 0), "NVIDIA H100 datasheet, 2022"),
    "H100 SXM": Gpu(81559, 67.0, 989.0, 3350, 64, (9, 0), "NVIDIA H100 datasheet, 2023"),
    "H200": Gpu(143771, 67.0, 989.0, 4800, 64, (9, 0), "NVIDIA H200 datasheet, 2024"),
}


def find_gpu(name: str) -> str | None:
    """The name of a GPU in the table: "4090" and "NVIDIA GeForce RTX 4090" are "RTX 4090". None if
    unknown.
    """
    return next((known for known in GPUS if _plain(known) == _plain(name)), None)


def _plain(name: str) -> str:
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "".join(word for word in words if word not in ("nvidia", "geforce", "tesla", "rtx"))
