"""FLOPs of operators: PyTorch's own table, to which Talik's operators are added, and what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

import talik.kernels.bf16_matmul  # noqa: F401 - defines the operators


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """The FLOPs of one call of an operator; None for operators without products.

    Attention counts every pair of positions, masked or not, as in PyTorch's table; half of them if the kernel
    is called with `is_causal` and skips the others.
    """
    if (own := _MISSING.get(func._schema.name)) is not None:
        flops = own(*args)
    elif (formula := flop_registry.get(func._overloadpacket)) is not None:
        flops = formula(*args, **kwargs, out_val=out)
    else:
        return None
    return flops // 2 if _is_causal(func, args, kwargs) else flops


def _is_causal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    names = [argument.name for argument in func._schema.arguments] if "attention" in func._schema.name else []
    return {**dict(zip(names, args, strict=False)), **kwargs}.get("is_causal", False)


def _linear(hidden: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * hidden.numel() * weight.shape[0]


def _grouped(one: Tensor, other: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> int:
    """Rows of `one` multiplied by one matrix each; for the weights' gradient, sums over groups."""
    return 2 * one.numel() * other.shape[-1] // (one.shape[0] if one.dim() == 3 == other.dim() + 1 else 1)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return 2 * query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return _attention(query, key, value) * 5 // 2  # five products, not two


register_flop_formula(torch.ops.talik.mm, get_raw=True)(flop_registry[torch.ops.aten.mm])
register_flop_formula(torch.ops.talik.grouped_mm, get_raw=True)(_grouped)
# Operators of PyTorch that its own table does not have.
_MISSING: dict[str, Callable[..., int]] = {
    "aten::linear": _linear,  # in inference mode it is not part of another operator
    "aten::scaled_dot_product_attention": _attention,  # nor is this one
    "aten::_grouped_mm": _grouped,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
