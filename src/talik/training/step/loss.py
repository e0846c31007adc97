"""Cross-entropy at the trained positions only, one chunk of logits at a time.

Loss and gradient are computed together, chunk by chunk, so that the logits of all positions never exist at
the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from talik.kernels.cross_entropy import accumulate_, cross_entropy
from talik.model.chain.chain import Chain


def trained_positions(
    labels: Int[Tensor, "batch sequence"],
) -> tuple[Int[Tensor, " trained"], Int[Tensor, " trained"]]:
    """Finds the positions whose next token is trained.

    Args:
        labels: At each position its own token, or -100 if that token is masked (not shifted). A label at the
            first position has no effect: no position predicts it.

    Returns:
        Flat positions (row times sequence plus column) whose *next* token is trained, and these tokens.
    """
    following = labels[:, 1:]
    row, column = (following != -100).nonzero(as_tuple=True)
    return row * labels.shape[1] + column, following[row, column]


def loss_backward(
    chain: Chain,
    hidden: Float[Tensor, "trained hidden"],
    targets: Int[Tensor, " trained"],
    weights: Mapping[nn.Parameter, Float[Tensor, ...]],
    chunk: int,
    divisor: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, "trained hidden"]]:
    """Computes the loss and its gradients.

    Args:
        chain: The model; its tail computes the logits.
        hidden: The output of the last layer at the trained positions.
        targets: The token that each of them predicts.
        weights: The trained parameters of the tail, each with the fp32 tensor its gradient is added to.
        chunk: How many positions have logits at the same time.
        divisor: The summed loss is divided by it.

    Returns:
        The loss (fp32), and its gradient with respect to `hidden`.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    hidden_grad, logits_grad = torch.empty_like(hidden), None
    for start in range(0, len(hidden), chunk):
        part = slice(start, min(start + chunk, len(hidden)))
        loss, logits_grad = _chunk_backward(
            chain, hidden[part], targets[part], hidden_grad[part], weights, divisor, logits_grad
        )
        total += loss
    return total, hidden_grad


def _chunk_backward(
    chain: Chain,
    hidden: Tensor,
    targets: Tensor,
    hidden_grad: Tensor,
    weights: Mapping[nn.Parameter, Tensor],
    divisor: int,
    logits_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes the loss and gradients of one chunk.

    A function of its own, so that a gradient as large as the head is freed before the next is computed.

    Args:
        chain: The model; its tail computes the logits.
        hidden: The output of the last layer at the positions of the chunk.
        targets: The token that each of them predicts.
        hidden_grad: Receives the gradient with respect to `hidden`.
        weights: The trained parameters of the tail, each with the tensor its gradient is added to.
        divisor: The summed loss is divided by it.
        logits_grad: The workspace that the first chunk, which is the largest, allocated; None for that chunk.

    Returns:
        The loss of the chunk, and the workspace for the gradient of the logits.
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        logits = chain.tail(leaf[None]).squeeze(0)
    if logits_grad is None:
        logits_grad = torch.empty_like(logits, requires_grad=False)
    loss = cross_entropy(logits.detach(), targets, divisor, logits_grad[: len(hidden)])
    leaf_grad, *weight_grads = torch.autograd.grad(logits, (leaf, *weights), logits_grad[: len(hidden)])
    hidden_grad.copy_(leaf_grad)
    for total, gradient in zip(weights.values(), weight_grads, strict=True):
        accumulate_(total, gradient)
    return loss, logits_grad


class _ChunkedLoss(torch.autograd.Function):
    """The mean loss as a differentiable function: the forward computes the gradients, too."""

    @staticmethod
    def forward(
        ctx: Any, chain: Chain, hidden: Tensor, targets: Tensor, chunk: int, *weights: nn.Parameter
    ) -> Tensor:
        sums = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights}
        total, hidden_grad = loss_backward(chain, hidden, targets, sums, chunk, max(len(hidden), 1))
        ctx.gradients = (hidden_grad, *(whole.to(weight.dtype) for weight, whole in sums.items()))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        hidden_grad, *weight_grads = (gradient * outputs[0] for gradient in ctx.gradients)
        return None, hidden_grad, None, None, *weight_grads


def chunked_loss(
    chain: Chain,
    hidden: Float[Tensor, "batch sequence hidden"],
    labels: Int[Tensor, "batch sequence"],
    chunk: int = 256,
) -> Float[Tensor, ""]:
    """The mean loss over the trained tokens, for a training loop of your own; call `.backward()` on it.

    The trained parameters of the tail get their gradients, too.

    Args:
        chain: The model.
        hidden: The output of the last layer.
        labels: At each position its own token, or -100 if that token is masked (not shifted).
        chunk: How many positions have logits at the same time.

    Returns:
        The loss in fp32; 0 if no token is trained.
    """
    positions, targets = trained_positions(labels)
    trained = hidden.flatten(0, 1)[positions]
    weights = tail_weights(chain)
    return _ChunkedLoss.apply(chain, trained, targets, chunk, *weights)  # pyright: ignore[reportReturnType]


def tail_weights(chain: Chain) -> list[nn.Parameter]:
    """The trained parameters of the final norm and the head."""
    return [
        parameter
        for name, parameter in chain.model.named_parameters()
        if parameter.requires_grad and chain.parts.part(name) in ("norm", "head", "other")
    ]
