"""Cross-entropy at the trained positions only, one chunk of logits at a time.

The gradient is computed with the loss, chunk by chunk, so that the logits of all positions never exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from talik.kernels.cross_entropy import accumulate_, cross_entropy
from talik.model.chain.chain import Chain


def trained_rows(
    labels: Int[Tensor, "batch sequence"],
) -> tuple[Int[Tensor, " trained"], Int[Tensor, " trained"]]:
    """Where the next token is trained, and what it is.

    Labels stand on their tokens' positions, -100 where masked. Returns flat positions (row times sequence
    plus column) whose *next* token is trained, and that token. A first token has nothing before it.
    """
    following = labels[:, 1:]
    row, column = (following != -100).nonzero(as_tuple=True)
    return row * labels.shape[1] + column, following[row, column]


def loss_backward(
    chain: Chain,
    rows: Float[Tensor, "trained hidden"],
    targets: Int[Tensor, " trained"],
    weights: Mapping[nn.Parameter, Float[Tensor, ...]],
    chunk: int,
    divisor: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, "trained hidden"]]:
    """The loss, summed over the tokens and divided by `divisor`, in fp32, and its gradient at `rows`.

    The gradient of each of `weights` is added to the tensor beside it.
    """
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    of_rows, of_logits = torch.empty_like(rows), None
    for start in range(0, len(rows), chunk):
        place = slice(start, min(start + chunk, len(rows)))
        loss, of_logits = _chunk_backward(
            chain, rows[place], targets[place], of_rows[place], weights, divisor, of_logits
        )
        total += loss
    return total, of_rows


def _chunk_backward(
    chain: Chain,
    rows: Tensor,
    targets: Tensor,
    of_rows: Tensor,
    weights: Mapping[nn.Parameter, Tensor],
    divisor: int,
    of_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One chunk's loss, and the room for the gradient at the logits, which the first and largest chunk makes.

    Apart, so that a gradient as large as the head is gone before the next is made.
    """
    with torch.enable_grad():
        part = rows.detach().requires_grad_()
        logits = chain.tail(part[None]).squeeze(0)
    if of_logits is None:
        of_logits = torch.empty_like(logits, requires_grad=False)
    loss = cross_entropy(logits.detach(), targets, divisor, of_logits[: len(rows)])
    of_part, *of_weights = torch.autograd.grad(logits, (part, *weights), of_logits[: len(rows)])
    of_rows.copy_(of_part)
    for whole, gradient in zip(weights.values(), of_weights, strict=True):
        accumulate_(whole, gradient)
    return loss, of_logits


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chain: Chain, rows: Tensor, targets: Tensor, chunk: int, *weights: nn.Parameter
    ) -> Tensor:
        sums = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights}
        total, of_rows = loss_backward(chain, rows, targets, sums, chunk, max(len(rows), 1))
        ctx.gradients = (of_rows, *(whole.to(weight.dtype) for weight, whole in sums.items()))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        of_rows, *of_weights = (gradient * outputs[0] for gradient in ctx.gradients)
        return None, of_rows, None, None, *of_weights


def chunked_loss(
    chain: Chain,
    hidden: Float[Tensor, "batch sequence hidden"],
    labels: Int[Tensor, "batch sequence"],
    chunk: int = 256,
) -> Float[Tensor, ""]:
    """The mean loss over the trained tokens, for a loop of one's own; call `.backward()` on it.

    `hidden` is what the last layer hands on; `labels` stand on their tokens, -100 where masked. The tail's
    trained weights get their gradients too. fp32; 0 if nothing is trained.
    """
    positions, targets = trained_rows(labels)
    rows = hidden.flatten(0, 1)[positions]
    weights = tail_weights(chain)
    return _ChunkedLoss.apply(chain, rows, targets, chunk, *weights)  # pyright: ignore[reportReturnType]


def tail_weights(chain: Chain) -> list[nn.Parameter]:
    """The trained parameters of the tail: final norm and head, as far as they are thawed."""
    return [
        parameter
        for name, parameter in chain.model.named_parameters()
        if parameter.requires_grad and chain.parts.part(name) in ("norm", "head", "other")
    ]
