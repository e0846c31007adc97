"""The optimizers: functions of tensors alone. One entry in OPTIMIZERS each; update.py applies them.

None of them reads a value back, starts a thread or compiles, so that a simulated step runs them too. State
is changed in place. The fields of the recipe that each reads stand in recipe.py, beside their help.
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

SLICE = 16 * 1024 * 1024  # elements that are updated at once: temporaries stay below 64 MiB a tensor
SMALLEST_8BIT = 4096  # elements of a tensor below which its state stays in fp32, as in bitsandbytes

ADAFACTOR_DECAY = 0.8  # of the squares' mean: 1 - step ** -0.8
ADAFACTOR_EPSILON = 1e-30  # added to the squares
MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5, which draws singular values towards 1

Form = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True, slots=True)
class Now:
    """What an update takes beside tensors; `step` counts from 1."""

    step: int
    learning_rate: float
    recipe: Recipe


def descend_(weight: Float[Tensor, " n"], direction: Float[Tensor, " n"], now: Now) -> None:
    """One slice of a weight goes along a direction."""
    weight.sub_(direction, alpha=now.learning_rate)


@dataclass(frozen=True, slots=True)
class Optimizer:
    """How one parameter is updated. `state` are the tensors kept for it, zeros at first.

    `descend` changes slices of the weight by those of the gradient and of each state. Where the whole
    gradient is needed, `direction` turns it, with the state, in place into the direction of the descent.
    """

    state: dict[str, Form]
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
    now: Now,
) -> None:
    """AdamW in place on fp32 tensors; the weight has decayed already."""
    beta1, beta2 = now.recipe.beta1, now.recipe.beta2
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = square.sqrt().div_(math.sqrt(1 - beta2**now.step)).add_(now.recipe.epsilon)
    weight.addcdiv_(mean, denominator, value=-now.learning_rate / (1 - beta1**now.step))


def adamw_8bit(shape: torch.Size, hidden: bool, recipe: Recipe) -> Optimizer:
    """AdamW with state of 8 bits in blocks of 256 (Dettmers et al. 2021, arXiv 2110.02861).

    Small tensors, and those that are not made of whole blocks, are AdamW's.
    """
    if shape.numel() < SMALLEST_8BIT or shape.numel() % BLOCK:
        return adamw(shape, hidden, recipe)
    state: dict[str, Form] = {}
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
    now: Now,
) -> None:
    """AdamW with what the codes stand for; the weight is changed before they are rounded again."""
    exact_mean = dequantized(mean, mean_absmax, signed=True)
    exact_square = dequantized(square, square_absmax, signed=False)
    adamw_(weight, gradient, exact_mean, exact_square, now)
    quantize_(mean, mean_absmax, exact_mean, signed=True)
    quantize_(square, square_absmax, exact_square, signed=False)


def adafactor(shape: torch.Size, hidden: bool, recipe: Recipe) -> Optimizer:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) without first moment or a rate of its own.

    Of a matrix's squared gradients the means of rows and columns are kept; of a vector's, each.
    """
    if len(shape) < 2:
        return Optimizer({"exp_avg_sq": (shape, torch.float32)}, direction=adafactor_vector_)
    rows, columns = shape[:-1], torch.Size([*shape[:-2], shape[-1]])
    state = {"exp_avg_sq_row": (rows, torch.float32), "exp_avg_sq_col": (columns, torch.float32)}
    return Optimizer(state, direction=adafactor_)


def adafactor_(
    gradient: Float[Tensor, "*stack rows columns"],
    of_rows: Float[Tensor, "*stack rows"],
    of_columns: Float[Tensor, "*stack columns"],
    now: Now,
) -> None:
    """The gradient divided by the root of its factored square; rows go through it a slice at a time."""
    new = now.step**-ADAFACTOR_DECAY
    rows, columns = gradient.shape[-2:]
    stack = gradient.view(-1, rows, columns), of_rows.view(-1, rows), of_columns.view(-1, columns)
    height = max(1, SLICE // columns)
    for matrix, row, column in zip(*stack, strict=True):
        column.mul_(1 - new)
        for part, means in zip(matrix.split(height), row.split(height), strict=True):
            squares = part.square().add_(ADAFACTOR_EPSILON)
            means.mul_(1 - new).add_(squares.mean(1), alpha=new)
            column.add_(squares.sum(0), alpha=new / rows)
            del squares  # before the next one is made
        matrix.mul_((row / row.mean()).rsqrt_()[:, None]).mul_(column.rsqrt())
    _clip(gradient)


def adafactor_vector_(gradient: Float[Tensor, " n"], square: Float[Tensor, " n"], now: Now) -> None:
    """The gradient divided by the root of its mean square."""
    new = now.step**-ADAFACTOR_DECAY
    square.mul_(1 - new).add_(gradient.square().add_(ADAFACTOR_EPSILON), alpha=new)
    gradient.mul_(square.rsqrt())
    _clip(gradient)


def _clip(direction: Float[Tensor, ...]) -> None:
    """Its root mean square is 1 at most."""
    root = torch.linalg.vector_norm(direction) / math.sqrt(direction.numel())
    direction.div_(root.clamp(min=1))


def muon(shape: torch.Size, hidden: bool, recipe: Recipe) -> Optimizer:
    """Muon (Jordan 2024, kellerjordan.github.io/posts/muon) for matrices of the layers, AdamW for the rest.

    Its direction is as large as AdamW's (Liu et al. 2025, arXiv 2502.16982), whose learning rates so fit. A
    stack of matrices, as of experts, is taken matrix by matrix.
    """
    if not hidden or len(shape) not in (2, 3) or 1 in shape[-2:]:
        return adamw(shape, hidden, recipe)
    return Optimizer({"momentum": (shape, torch.float32)}, direction=muon_)


def muon_(
    gradient: Float[Tensor, "*stack rows columns"], momentum: Float[Tensor, "*stack rows columns"], now: Now
) -> None:
    """The orthogonal matrix nearest to the gradient with Nesterov's momentum, for each of a stack."""
    rows, columns = gradient.shape[-2:]
    stack = gradient.view(-1, rows, columns), momentum.view(-1, rows, columns)
    for matrix, mean in zip(*stack, strict=True):
        mean.lerp_(matrix, 1 - MUON_MOMENTUM)
        matrix.lerp_(mean, MUON_MOMENTUM)
        matrix.copy_(orthogonal(matrix)).mul_(0.2 * math.sqrt(max(rows, columns)))


def orthogonal(matrix: Float[Tensor, "rows columns"]) -> BFloat16[Tensor, "rows columns"]:
    """About the orthogonal matrix nearest to one: five steps of a Newton-Schulz iteration in bf16.

    As torch.optim.Muon has it. The columns of a product depend on no others, so they are replaced in parts.
    """
    a, b, c = NEWTON_SCHULZ
    result = matrix.bfloat16()
    wide = result.T if result.shape[0] > result.shape[1] else result
    wide.div_(wide.norm().clamp(min=1e-7))
    for _ in range(5):
        gram = wide @ wide.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        for columns in wide.split(max(1, SLICE // wide.shape[0]), 1):
            columns.copy_(torch.addmm(columns, gram, columns, beta=a))
    return result


def sgd(shape: torch.Size, hidden: bool, recipe: Recipe) -> Optimizer:
    """Stochastic gradient descent, with momentum (as torch.optim.SGD) unless that is 0."""
    if not recipe.momentum:
        return Optimizer({})
    return Optimizer({"momentum": (shape, torch.float32)}, sgd_)


def sgd_(
    weight: Float[Tensor, " n"], gradient: Float[Tensor, " n"], momentum: Float[Tensor, " n"], now: Now
) -> None:
    """Along the decaying sum of gradients, in place."""
    momentum.mul_(now.recipe.momentum).add_(gradient)
    descend_(weight, momentum, now)


OPTIMIZERS: dict[str, Callable[[torch.Size, bool, Recipe], Optimizer]] = {
    "adamw": adamw,
    "adamw-8bit": adamw_8bit,
    "adafactor": adafactor,
    "muon": muon,
    "sgd": sgd,
}


def optimizer_of(name: str, shape: torch.Size, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer for one parameter. The number of its layer is in the name of a layer's one."""
    hidden = any(part.isdigit() for part in name.split("."))
    return OPTIMIZERS[recipe.optimizer](shape, hidden, recipe)


def round_stochastically_(
    target: Float[Tensor, " n"], exact: Float[Tensor, " n"], generator: torch.Generator | None = None
) -> None:
    """Writes fp32 `exact` into bf16 `target`, up or down at random, so that the mean is exact.

    Random bits are added below bf16's last one and cut off (as in Zamirai et al. 2020, arXiv 2010.06192).
    """
    bits = exact.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    target.copy_(rounded)


def learning_rate_at(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 1) of `steps`: a linear rise, then the schedule down to 0."""
    rise = round(recipe.warmup * steps)
    if step <= rise:
        return recipe.learning_rate * step / rise
    left = 1 - (step - rise - 1) / max(steps - rise, 1)
    if recipe.schedule == "linear":
        return recipe.learning_rate * left
    if recipe.schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1 - math.cos(math.pi * left))
    return recipe.learning_rate
