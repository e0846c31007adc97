"""Attention as CUDA computes it, on tensors that are not on a CUDA device.

PyTorch chooses the kernel of scaled_dot_product_attention by the device, and each kernel saves different
tensors for the backward. `cuda_attention` makes CUDA's choice and calls that kernel's operator, whose shapes
need no device, so that the log of a step on fake CPU tensors is that of a CUDA device.

The rules are those of select_sdp_backend in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; padding and
masks are those of scaled_dot_product_attention in aten/src/ATen/native/transformers/attention.cpp. Assumed:
an NVIDIA device, the default kernels and order, cuDNN newer than 9.15. Not modelled: nested tensors, dropout
that only cuDNN refuses, deterministic algorithms (no cuDNN), and workspaces that kernels allocate and free
(`flash_backward_bytes` and `efficient_backward_bytes` give those of the backward).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kernel = Literal["cudnn", "flash", "efficient", "math"]
HALF = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)
MASK_ALIGNMENT = 8  # mem_eff_alignment in attention.cpp: strides of a mask, in elements


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one attention. Query, key and value: (batch, heads, sequence, head dimension)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    gqa: bool

    @property
    def trains(self) -> bool:
        """True if tensors must be saved for a backward."""
        return torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (self.query, self.key, self.value)
        )

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        return self.query.shape[-1], self.key.shape[-1], self.value.shape[-1]

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.query.shape[-3], self.key.shape[-3], self.value.shape[-3]


@contextmanager
def cuda_attention(compute_capability: tuple[int, int] | None = None) -> Generator[None]:
    """Inside the context, scaled_dot_product_attention runs as on a CUDA device of this capability.

    An unknown capability (None) counts as 8.0. Works for tensors anywhere, fake or not, but only fake ones
    can run every kernel without the device. Applies to callers that look the function up in
    torch.nn.functional at call time, as sdpa_attention_forward of Transformers does, in all threads.
    """
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = partial(_attention, compute_capability or AMPERE)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def kernel_for(call: Call, compute_capability: tuple[int, int]) -> Kernel:
    """The first kernel, in CUDA's order of preference, that accepts the call."""
    if not _any_fused(call):
        return "math"
    if compute_capability[0] in (9, 10) and _cudnn(call):
        return "cudnn"
    if _flash(call, compute_capability):
        return "flash"
    return "efficient" if _efficient(call, compute_capability) else "math"


def flash_backward_bytes(
    batch: int, heads: int, sequence: int, head_dim: int, key_heads: int | None = None
) -> int:
    """Workspace of the backward of flash attention, in bytes.

    In mha_bwd of aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp: softmax_d and dq_accum in
    fp32, and dk_expanded and dv_expanded in 16 bits if there are fewer key heads than query heads. They are
    allocated within the kernel's operator, so a log does not show them.
    """
    rounded = _up(sequence, 128)
    softmax_d = 4 * batch * heads * rounded
    dq_accum = 4 * batch * heads * rounded * _up(head_dim, 32 if head_dim <= 128 else 64)
    expanded = 2 * batch * heads * sequence * _up(head_dim, 8) if key_heads not in (None, heads) else 0
    return softmax_d + dq_accum + 2 * expanded


def efficient_backward_bytes(
    batch: int,
    heads: int,
    sequence: int,
    keys: int,
    head_dim: int,
    itemsize: int,
    compute_capability: tuple[int, int],
) -> int:
    """Workspace of the backward of memory-efficient attention, in bytes.

    In _efficient_attention_backward of aten/src/ATen/native/transformers/cuda/attention_backward.cu: delta,
    which an fp32 kernel computes from a product as large as the query, and workspace_size() of
    mem_eff_attention/kernel_backward.h: dq in fp32, and dk and dv as often as the keys are split, unless the
    kernel keeps them in registers.
    """
    rows, half = batch * heads, itemsize == 2
    of_queries, of_keys, in_registers = _backward_tile(head_dim, half, compute_capability)
    elements = _up(sequence, of_queries) * _up(head_dim, of_keys)
    if half and not in_registers:
        splits = max(1, min(-(-keys // of_keys), 200 // rows))
        elements += 2 * splits * _up(keys, of_keys) * _up(head_dim, of_queries)
    product = 0 if half else sequence * head_dim
    return 4 * rows * (sequence + max(elements, product))


def _backward_tile(head_dim: int, half: bool, compute_capability: tuple[int, int]) -> tuple[int, int, bool]:
    """The first kernel of kernels/cutlassB.h: queries and keys of its tile; are dk and dv in registers?

    Assumed: the larger tiles need more shared memory than 7.5, 8.6, 8.9 and 12.x have (64 to 99 KB per
    block).
    """
    small = (
        compute_capability < AMPERE or compute_capability in ((8, 6), (8, 9)) or compute_capability[0] > 11
    )
    if head_dim <= 64:
        return 64, 64, half
    if head_dim <= 96 and half and compute_capability in ((8, 6), (8, 9)):
        return 128, 64, True
    if small:
        return 64, 64, False
    return (128, 128, True) if half and head_dim <= 128 else (128, 64, False)


def _attention(
    compute_capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replaces scaled_dot_product_attention."""
    call = Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return RUN[kernel_for(call, compute_capability)](call)


def _any_fused(call: Call) -> bool:
    """Conditions of every kernel except "math": check_tensor_shapes and the dense constraints."""
    tensors = (call.query, call.key, call.value)
    return (
        all(tensor.dim() == 4 and tensor.stride(-1) == 1 for tensor in tensors)
        and (call.mask is None or call.mask.stride(-1) == 1)
        and len({tensor.shape[0] for tensor in tensors}) == 1
        and min(call.query.shape[-2], call.key.shape[-2]) > 0
    )


def _heads_fit(call: Call, *, grouped: bool) -> bool:
    """check_batch_size_and_num_heads_dense."""
    query, key, value = call.heads
    if grouped and call.gqa:
        return key == value and query % key == 0
    return query == key == value


def _cudnn(call: Call) -> bool:
    """can_use_cudnn_attention, on Hopper and Blackwell."""
    query, key, value = call.head_sizes
    small = max(query, value) <= 128 or (query, value) == (192, 128)
    return (
        call.query.dtype in HALF
        and _heads_fit(call, grouped=True)
        and small
        and query == key
        and query % 8 == value % 8 == 0
        and call.key.shape[-2] > 1
        and not (call.mask is not None and call.mask.requires_grad)
    )


def _flash(call: Call, compute_capability: tuple[int, int]) -> bool:
    """can_use_flash_attention."""
    sizes = call.head_sizes
    return (
        compute_capability >= AMPERE
        and call.query.dtype in HALF
        and call.mask is None
        and len(set(sizes)) == 1
        and sizes[0] <= 256
        and _heads_fit(call, grouped=True)
        and not (call.causal and call.query.shape[-2] != call.key.shape[-2])
        and not (call.trains and _too_large_for_flash(call, compute_capability))
    )


def _too_large_for_flash(call: Call, compute_capability: tuple[int, int]) -> bool:
    """check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120."""
    if not ((8, 6) <= compute_capability <= (8, 9) or compute_capability in ((12, 0), (12, 1))):
        return False
    return 192 < call.head_sizes[0] <= 224 or (call.head_sizes[0] > 224 and call.dropout > 0)


def _efficient(call: Call, compute_capability: tuple[int, int]) -> bool:
    """can_use_mem_efficient_attention; no bf16 before Ampere."""
    ampere, half = compute_capability >= AMPERE, call.query.dtype in HALF
    if call.query.dtype not in (torch.float16, torch.float32) and not (ampere and half):
        return False
    alignment = (8 if half else 4) if ampere else (8 if half and compute_capability >= (7, 0) else 1)
    query, key, value = call.head_sizes
    return query == key and query % alignment == value % alignment == 0 and _heads_fit(call, grouped=False)


def _run_cudnn(call: Call) -> Tensor:
    lowest = torch.finfo(call.query.dtype).min
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        call.query, call.key, call.value, _added(call, lowest), call.trains, call.dropout, call.causal,
        False, scale=call.scale,
    )[0]  # fmt: skip


def _run_flash(call: Call) -> Tensor:
    """Head dimensions are padded to a multiple of 8; the scale is that of the unpadded ones."""
    size = call.head_sizes[0]
    scale = call.scale if call.scale is not None else size**-0.5
    padded = [_padded(tensor, 8) for tensor in (call.query, call.key, call.value)]
    out = torch.ops.aten._scaled_dot_product_flash_attention(
        *padded, call.dropout, call.causal, False, scale=scale
    )[0]
    return out if out.shape[-1] == size else out[..., :size]


def _run_efficient(call: Call) -> Tensor:
    mask = _added(call, float("-inf"))
    if mask is not None:
        mask = _aligned(mask).expand(*call.query.shape[:-1], call.key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        call.query, call.key, call.value, mask, call.trains, call.dropout, call.causal, scale=call.scale
    )[0]


def _run_math(call: Call) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(
        call.query, call.key, call.value, _added(call, float("-inf")), call.dropout, call.causal,
        scale=call.scale, enable_gqa=call.gqa,
    )[0]  # fmt: skip


RUN: dict[Kernel, Callable[[Call], Tensor]] = {
    "cudnn": _run_cudnn,
    "flash": _run_flash,
    "efficient": _run_efficient,
    "math": _run_math,
}


def _added(call: Call, hidden: float) -> Tensor | None:
    """The mask as numbers added to the scores; `hidden` at masked positions."""
    if call.mask is None or call.mask.dtype != torch.bool:
        return call.mask
    number = torch.scalar_tensor(hidden, dtype=call.query.dtype, device=call.mask.device)
    return torch.where(call.mask, 0.0, number)


def _aligned(mask: Tensor) -> Tensor:
    """A mask with strides that the memory-efficient kernel can read; a padded copy if necessary."""
    if all(stride % MASK_ALIGNMENT == 0 for stride in mask.stride()[:-1]) and mask.stride(-1) == 1:
        return mask
    extra = MASK_ALIGNMENT - mask.shape[-1] % MASK_ALIGNMENT
    return functional.pad(mask, [0, extra])[..., : mask.shape[-1]]


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    extra = -tensor.shape[-1] % multiple
    return functional.pad(tensor, [0, extra]) if extra else tensor


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
