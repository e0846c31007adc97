"""Multiplies bf16 matrices in fp32, for CPUs without bf16 instructions.

Such CPUs (AVX2 only: most desktops) multiply bf16 matrices 5 to 10 times more slowly than fp32 ones
(docs/log.md). The definition of the result stays: sums in fp32, rounded once. Operands are converted piece by
piece and multiplied by the fast fp32 routines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import BFloat16, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_map_only

from talik.machine.device import without_bf16

PIECE = 1 << 20  # elements of the larger operand and of the result held in fp32 at once
FEW = 4  # rows: smaller products are bound by reading the weight, and bf16 is half as many bytes

_library = torch.library.Library("talik", "FRAGMENT")
_library.define("mm(Tensor one, Tensor other, Tensor? bias) -> Tensor")
_library.define("grouped_mm(Tensor one, Tensor other, Tensor ends) -> Tensor")


def bf16_as_fp32(wanted: bool | None = None) -> contextlib.AbstractContextManager[Any]:
    """Computes products and attention of bf16 CPU tensors in fp32, rounded to bf16, inside the context.

    Applies to calls of this thread and their backward. Active by default if the CPU has no bf16 instructions.
    """
    return _AsFp32() if (without_bf16() if wanted is None else wanted) else contextlib.nullcontext()


def for_recompute() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """The `context_fn` for checkpointing: PyTorch leaves function modes during a backward."""
    return contextlib.nullcontext(), bf16_as_fp32(fp32_in_use())


def fp32_in_use() -> bool:
    """True inside `bf16_as_fp32`."""
    return any(isinstance(mode, _AsFp32) for mode in _get_current_function_mode_stack())


def mm(
    one: BFloat16[Tensor, "rows inner"],
    other: BFloat16[Tensor, "inner columns"],
    bias: BFloat16[Tensor, " columns"] | None = None,
) -> BFloat16[Tensor, "rows columns"]:
    """The product plus a bias per column: accumulated in fp32, rounded to bf16. Not differentiable."""
    return torch.ops.talik.mm(one, other, bias)


def linear(
    hidden: BFloat16[Tensor, "*batch inputs"],
    weight: BFloat16[Tensor, "outputs inputs"],
    bias: BFloat16[Tensor, " outputs"] | None = None,
) -> BFloat16[Tensor, "*batch outputs"]:
    """torch.nn.functional.linear with `mm` for its product and those of its gradients."""
    return _Linear.apply(hidden, weight, bias)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_hidden, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(hidden if of_weight else None, weight if of_hidden else None)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return mm(rows, weight.T, bias).view(*hidden.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (hidden, weight) = outputs, ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_hidden = None if weight is None else mm(rows, weight).view(*gradient.shape[:-1], -1)
        of_weight = None if hidden is None else mm(rows.T, hidden.reshape(len(rows), -1))
        return of_hidden, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def grouped_mm(
    one: BFloat16[Tensor, ...],
    other: BFloat16[Tensor, ...],
    offs: Int[Tensor, " groups"] | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch.nn.functional.grouped_mm by `mm`, for mixtures of experts.

    Args:
        one: (rows, inner).
        other: (groups, inner, columns). Rows up to offs[0] are multiplied by the first matrix, and so on;
            rows after the last group become 0.
        offs: (groups,) int32, the end of each group of rows.
    """
    if (one.dim(), other.dim()) != (2, 3) or offs is None or bias is not None or out_dtype is not None:
        return functional.grouped_mm(one, other, offs=offs, bias=bias, out_dtype=out_dtype)
    return _GroupedMM.apply(one, other, offs)  # pyright: ignore[reportReturnType]


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        of_rows, of_weights, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if of_weights else None, weights if of_rows else None, ends)
        return torch.ops.talik.grouped_mm(rows, weights, ends)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,), (rows, weights, ends) = outputs, ctx.saved_tensors
        multiply = torch.ops.talik.grouped_mm
        of_rows = None if weights is None else multiply(gradient, weights.transpose(1, 2), ends)
        of_weights = None if rows is None else multiply(rows.T, gradient, ends)
        return of_rows, of_weights, None


def _grouped_mm(one: Tensor, other: Tensor, ends: Tensor) -> Tensor:
    """Like PyTorch's operator: rows times stacked matrices, or two matrices for each group of the shared
    dimension.
    """
    out = _grouped_out(one, other, ends).zero_()
    for group, place in _groups(ends):
        if other.dim() == 3:
            operands = out[place], one[place], other[group]
        else:
            operands = out[group], one[:, place], other[place]
        if len(operands[1]) < FEW:
            torch.mm(*operands[1:], out=operands[0])
        else:
            _multiply(*operands)
    return out


def _grouped_out(one: Tensor, other: Tensor, ends: Tensor) -> Tensor:
    groups = () if other.dim() == 3 else (len(ends),)
    return one.new_empty(*groups, len(one), other.shape[-1])


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Index and rows of each group that is not empty."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = end


def _mm(one: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
    out = one.new_empty(len(one), other.shape[1])
    _multiply(out, one, other, None if bias is None else bias.float().expand(out.shape))
    return out


def _multiply(out: Tensor, one: Tensor, other: Tensor, added: Tensor | None = None) -> None:
    """Writes the product into `out`."""
    if _inner_is_most(len(one), one.shape[1], other.shape[1]):
        _by_inner(out, one, other, added)
    elif len(one) > other.shape[1]:
        _by_columns(out.T, other.T, one.T, None if added is None else added.T)
    else:
        _by_columns(out, one, other, added)


def _by_inner(out: Tensor, one: Tensor, other: Tensor, added: Tensor | None) -> None:
    """Writes the product into `out`, accumulated in fp32 over pieces of the shared dimension."""
    total = torch.zeros(out.shape, device=out.device)
    step = _step(total, one.shape[1])
    first, second = (torch.empty_like(wide, dtype=torch.float32) for wide in (one[:, :step], other[:step]))
    for start in range(0, one.shape[1], step):
        left, right = one[:, start : start + step], other[start : start + step]
        total.addmm_(first[:, : len(right)].copy_(left), second[: len(right)].copy_(right))
    out.copy_(total if added is None else total.add_(added))


def _by_columns(out: Tensor, one: Tensor, other: Tensor, added: Tensor | None) -> None:
    """Writes the product into `out` by columns of `other`; `one`, the smaller operand, is converted as a
    whole.
    """
    whole, step = one.float(), _step(one, other.shape[1])
    part, result = (torch.empty_like(wide[:, :step], dtype=torch.float32) for wide in (other, out))
    for start in range(0, other.shape[1], step):
        place = slice(start, start + step)
        columns = other[:, place]
        count = columns.shape[1]
        product = torch.mm(whole, part[:, :count].copy_(columns), out=result[:, :count])
        out[:, place] = product if added is None else product.add_(added[:, place])


def _inner_is_most(rows: int, inner: int, columns: int) -> bool:
    return inner > max(rows, columns)


def _step(matrix: Tensor, most: int) -> int:
    """The size of a piece of one dimension, for a matrix of the two others."""
    return min(most, max(PIECE // max(*matrix.shape, 1), 16))


def workspace(operator: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The workspace of a product on the meta device, except for a bias in fp32: for memory simulation."""
    if operator is torch.ops.talik.mm.default:
        rows, inner = args[0].shape
        return _workspace(rows, inner, args[1].shape[1])
    if operator is torch.ops.talik.grouped_mm.default:
        one, other, ends = args
        most = max((place.stop - place.start for _, place in _groups(ends)), default=0)
        rows, inner = (most, one.shape[1]) if other.dim() == 3 else (len(one), most)
        return _workspace(rows, inner, other.shape[-1])
    return []


def _workspace(rows: int, inner: int, columns: int) -> list[Tensor]:
    """The workspace of one `_mm`."""
    if _inner_is_most(rows, inner, columns):
        stays = torch.empty(rows, columns, device="meta")
    else:
        stays = torch.empty(min(rows, columns), inner, device="meta")
    parts = _step(stays, max(rows, inner, columns)) * sum(stays.shape)
    return [stays, torch.empty(parts, device="meta")]


_library.impl("mm", _mm, "CompositeExplicitAutograd")
_library.impl("grouped_mm", _grouped_mm, "CompositeExplicitAutograd")
torch.library.register_fake("talik::grouped_mm", _grouped_out, lib=_library)


@torch.library.register_fake("talik::mm", lib=_library)
def _(one: Tensor, other: Tensor, bias: Tensor | None) -> Tensor:
    return one.new_empty(len(one), other.shape[1])


class _AsFp32(TorchFunctionMode):
    """Replaces the functions that layers of Transformers call for products."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = _REPLACED.get(func)
        if replacement is None or not _worth_it(args):
            replacement = func
        return replacement(*args, **kwargs or {})


def _bf16_on_cpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _worth_it(args: tuple[Any, ...]) -> bool:
    """True if the first matrix operand is bf16 and has enough rows."""
    matrices = (arg for arg in args if isinstance(arg, Tensor) and arg.dim() > 1)
    first = next(matrices, None)
    return first is not None and _bf16_on_cpu(first) and first.shape[-2] >= FEW


def _in_fp32(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A function whose operands are small enough to be converted as a whole."""
    raised = tree_map_only(Tensor, lambda t: t.float() if _bf16_on_cpu(t) else t, (args, kwargs))
    return func(*raised[0], **raised[1]).to(torch.bfloat16)


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    functional.linear: linear,
    torch._grouped_mm: grouped_mm,  # pyright: ignore[reportPrivateImportUsage]
    **{
        func: partial(_in_fp32, func)
        for func in (
            *(functional.scaled_dot_product_attention, functional.conv1d),
            *(torch.matmul, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
            *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm),
        )
    },
}
