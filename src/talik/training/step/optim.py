"""The optimizers, as functions of tensors: one entry in OPTIMIZERS each. `update` applies them in slices.

No optimizer reads a tensor's value, starts a thread or compiles, so that the planner can run it on fake
tensors. State is changed in place. The recipe's fields that an optimizer reads are described in recipe.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor

from talik.kernels.blockwise import BLOCK, dequantized, quantize_
from talik.recipe.recipe import Recipe

UPDATE_SLICE = 16 * 1024 * 1024  # elements updated at once: each temporary tensor is at most 64 MiB
SMALLEST_8BIT = 4096  # smaller tensors (in elements) have fp32 state, as in bitsandbytes

ADAFACTOR_DECAY = 0.8  # the second moment decays by 1 - step ** -0.8
ADAFACTOR_EPSILON = 1e-30  # added to the squared gradient
MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5 moves singular values towards 1

TensorForm = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True, slots=True)
class StepContext:
    """The arguments of an update that are not tensors; `step` counts from 1."""

    step: int
    learning_rate: float
    recipe: Recipe


def descend_(weight: Float[Tensor, " n"], direction: Float[Tensor, " n"], context: StepContext) -> None:
    """Subtracts a direction, times the learning rate, from one slice of a weight."""
    weight.sub_(direction, alpha=context.learning_rate)


@dataclass(frozen=True, slots=True)
class Optimizer:
    """How one parameter is updated.

    Attributes:
        state: Shape and dtype of each state tensor of the parameter, by name; they begin as zeros.
        descend: `descend(weight, gradient, *state, context)` updates one slice of the weight in place.
        direction: For optimizers that need the whole gradient: `direction(gradient, *state, context)` turns
            the gradient in place into the direction that `descend` then subtracts, without state.
    """

    state: dict[str, TensorForm]
    descend: Callable[..., None] = descend_
    direction: Callable[..., None] | None = None


def adamw(shape: torch.Size, hidden: bool, recipe: Recipe) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101): two fp32 tensors."""
    return Optimizer({key: (shape, torch.float32) for key in ("exp_avg", "exp_avg_sq")}, adamw_)


def adamw_(
    weight: Float[Tensor, " n"],
    gradient: Float[Tensor, " n"],
    mean: Float[Tensor, " n"],
    square: Float[Tensor, " n"],
    context: StepContext,
) -> None:
    """Updates one slice in place, all fp32; weight decay was applied before."""
    beta1, beta2 = context.recipe.beta1, context.recipe.beta2
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = square.sqrt().div_(math.sqrt(1 - beta2**context.step)).add_(context.recipe.epsilon)
    weight.addcdiv_(mean, denominator, value=-context.learning_rate / (1 - beta1**context.step))


def adamw_8bit(shape: torch.Size, hidden: bool, recipe: Recipe) -> Optimizer:
    """AdamW with 8-bit state in blocks of 256 (Dettmers et al. 2021, arXiv 2110.02861).

    Tensors that are small, or that do not divide into whole blocks, have the state of AdamW.
    """
    if shape.numel() < SMALLEST_8BIT or shape.numel() % BLOCK:
        return adamw(shape, hidden, recipe)
    state: dict[str, TensorForm] = {}
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = shape, torch.uint8
        state[f"{key}_absmax"] = torch.Size([shape.numel() // BLOCK]), torch.float32
    return Optimizer(state, adamw_8bit_)


def adamw_8bit_(
    weight: Float[Tensor, " n"],
    gradient: Float[Tensor, " n"],
    mean: UInt8[Tensor, " n"],
    mean_absmax: Float[Tensor, " blocks"],
    square: UInt8[Tensor, " n"],
    square_absmax: Float[Tensor, " blocks"],
    context: StepContext,
) -> None:
    """Dequantizes the state, updates one slice, and quantizes the new state."""
    exact_mean = dequantized(mean, mean_absmax, signed=True)
    exact_square = dequantized(square, square_absmax, signed=False)
    adamw_(weight, gradient, exact_mean, exact_square, context)
    quantize_(mean, mean_absmax, exact_mean, signed=True)
    quantize_(square, square_absmax, exact_square, signed=False)


def adafactor(shape: torch.Size, hidden: bool, recipe: Recipe) -> Optimizer:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) without first moment and relative step size.

    The second moment of a matrix is stored as its row and column means; that of a vector in full.
    """
    if len(shape) < 2:
        return Optimizer({"exp_avg_sq": (shape, torch.float32)}, direction=adafactor_vector_)
    rows, columns = shape[:-1], torch.Size([*shape[:-2], shape[-1]])
    state = {"exp_avg_sq_row": (rows, torch.float32), "exp_avg_sq_col": (columns, torch.float32)}
    return Optimizer(state, direction=adafactor_)


def adafactor_(
    gradient: Float[Tensor, "*stack rows columns"],
    row_means: Float[Tensor, "*stack rows"],
    column_means: Float[Tensor, "*stack columns"],
    context: StepContext,
) -> None:
    """Divides the gradient by the root of its factored second moment, some rows at a time."""
    new_share = context.step**-ADAFACTOR_DECAY
    rows, columns = gradient.shape[-2:]
    stack = gradient.view(-1, rows, columns), row_means.view(-1, rows), column_means.view(-1, columns)
    height = max(1, UPDATE_SLICE // columns)
    for matrix, row, column in zip(*stack, strict=True):
        column.mul_(1 - new_share)
        for part, means in zip(matrix.split(height), row.split(height), strict=True):
            squares = part.square().add_(ADAFACTOR_EPSILON)
            means.mul_(1 - new_share).add_(squares.mean(1), alpha=new_share)
            column.add_(squares.sum(0), alpha=new_share / rows)
            del squares  # free it before the next one is computed
        matrix.mul_((row / row.mean()).rsqrt_()[:, None]).mul_(column.rsqrt())
    _clip(gradient)


def adafactor_vector_(
    gradient: Float[Tensor, " n"], square: Float[Tensor, " n"], context: StepContext
) -> None:
    """Divides the gradient by the root of its second moment."""
    new_share = context.step**-ADAFACTOR_DECAY
    square.mul_(1 - new_share).add_(gradient.square().add_(ADAFACTOR_EPSILON), alpha=new_share)
    gradient.mul_(square.rsqrt())
    _clip(gradient)


def _clip(direction: Float[Tensor, ...]) -> None:
    """Scales a direction down to a root mean square of at most 1."""
    root = torch.linalg.vector_norm(direction) / math.sqrt(direction.numel())
    direction.div_(root.clamp(min=1))


def muon(shape: torch.Size, hidden: bool, recipe: Recipe) -> Optimizer:
    """Muon (Jordan 2024, kellerjordan.github.io/posts/muon) for matrices of the layers, AdamW for the rest.

    Its direction is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that the learning
    rates of AdamW fit. A stack of matrices, as of experts, is updated matrix by matrix.
    """
    if not hidden or len(shape) not in (2, 3) or 1 in shape[-2:]:
        return adamw(shape, hidden, recipe)
    return Optimizer({"momentum": (shape, torch.float32)}, direction=muon_)


def muon_(
    gradient: Float[Tensor, "*stack rows columns"],
    momentum: Float[Tensor, "*stack rows columns"],
    context: StepContext,
) -> None:
    """Replaces each gradient matrix by the orthogonal matrix nearest to its Nesterov momentum."""
    rows, columns = gradient.shape[-2:]
    stack = gradient.view(-1, rows, columns), momentum.view(-1, rows, columns)
    for matrix, mean in zip(*stack, strict=True):
        mean.lerp_(matrix, 1 - MUON_MOMENTUM)
        matrix.lerp_(mean, MUON_MOMENTUM)
        matrix.copy_(orthogonal(matrix)).mul_(0.2 * math.sqrt(max(rows, columns)))


def orthogonal(matrix: Float[Tensor, "rows columns"]) -> BFloat16[Tensor, "rows columns"]:
    """Approximates the nearest orthogonal matrix by five Newton-Schulz iterations in bf16.

    The iteration is that of torch.optim.Muon. The columns of the product are independent of each other, so
    they are computed and replaced in slices.
    """
    a, b, c = NEWTON_SCHULZ
    result = matrix.bfloat16()
    wide = result.T if result.shape[0] > result.shape[1] else result
    wide.div_(wide.norm().clamp(min=1e-7))
    for _ in range(5):
        gram = wide @ wide.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        for columns in wide.split(max(1, UPDATE_SLICE // wide.shape[0]), 1):
            columns.copy_(torch.addmm(columns, gram, columns, beta=a))
    return result


def sgd(shape: torch.Size, hidden: bool, recipe: Recipe) -> Optimizer:
    """Stochastic gradient descent, with the momentum of torch.optim.SGD unless `momentum` is 0."""
    if not recipe.momentum:
        return Optimizer({})
    return Optimizer({"momentum": (shape, torch.float32)}, sgd_)


def sgd_(
    weight: Float[Tensor, " n"],
    gradient: Float[Tensor, " n"],
    momentum: Float[Tensor, " n"],
    context: StepContext,
) -> None:
    """Adds the gradient to the decayed momentum, and descends along it."""
    momentum.mul_(context.recipe.momentum).add_(gradient)
    descend_(weight, momentum, context)


OPTIMIZERS: dict[str, Callable[[torch.Size, bool, Recipe], Optimizer]] = {
    "adamw": adamw,
    "adamw-8bit": adamw_8bit,
    "adafactor": adafactor,
    "muon": muon,
    "sgd": sgd,
}


def optimizer_of(name: str, shape: torch.Size, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer for one parameter.

    A parameter inside a layer is recognised by the layer index in its name.
    """
    hidden = any(part.isdigit() for part in name.split("."))
    return OPTIMIZERS[recipe.optimizer](shape, hidden, recipe)


def round_stochastically_(
    target: Float[Tensor, " n"], exact: Float[Tensor, " n"], generator: torch.Generator | None = None
) -> None:
    """Rounds fp32 `exact` into bf16 `target`, up or down at random, so that the mean is exact.

    Random bits are added below the last bit of bf16 and truncated (Zamirai et al. 2020, arXiv 2010.06192).
    """
    bits = exact.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    target.copy_(rounded)
