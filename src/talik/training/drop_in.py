"""Lets the forward of a Transformers model compute the loss as Talik does, for any trainer or loop.

Trainers and loops call `model(input_ids=..., attention_mask=..., labels=...)` and read `loss`. Nothing else
changes: the model keeps its class, its weights, `generate` and `save_pretrained`.
"""

from __future__ import annotations

from functools import wraps
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from talik.base.errors import UsageError
from talik.model.chain.chain import Chain, first_trained_layer, run_layers
from talik.training.step.loss import chunked_loss

# Arguments that a caller may pass with these values: they describe what this forward does anyway.
_AS_IS = {"use_cache": False, "return_dict": True, "output_attentions": False, "output_hidden_states": False}


def drop_in(model: PreTrainedModel, chunk: int = 256) -> None:
    """Replaces the model's forward, so that the loss leaves the frozen trunk out of the graph.

    Afterwards `model(input_ids=..., attention_mask=..., labels=...)` returns an output with `loss`; `logits`
    is None. `labels` has at each position its own token, or -100 if that token is masked (not shifted). The
    loss is the mean over the trained tokens, or their sum divided by `num_items_in_batch`, which a Trainer
    passes. Without labels the model's own forward runs. Parameters that require a gradient when the forward
    is called are trained (`talik.freeze`). In training mode dropout is on in all layers, the trunk's too.

    Args:
        model: The model; it is changed in place.
        chunk: How many positions have logits at the same time.

    Raises:
        ChainError: The model cannot be run layer by layer.
        UsageError: The forward was replaced before. When the forward is called: the embeddings require a
            gradient, or an argument is not supported.
    """
    if "forward" in vars(model):
        problem = f"the forward of this {type(model).__name__} was replaced before"
        raise UsageError(problem, remedy="Call talik.drop_in once, before other libraries wrap the model.")
    own = type(model).forward
    patched: Any = model
    patched.talik_chain = Chain(model)  # on the model, so that a deep copy has its own chain
    # The chain calls the plain forward, not one that others wrap: nested autocast would never be left.
    patched.talik_chain.forward = MethodType(own, model)

    @wraps(own)  # a Trainer drops the columns that the signature does not name
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return own(self, *args, **kwargs)
        if args:
            raise UsageError("with labels, pass all arguments to this model by name: input_ids=...")
        return CausalLMOutputWithPast(loss=_loss(self.talik_chain, chunk, labels=labels, **kwargs))  # pyright: ignore[reportArgumentType]

    patched.forward = MethodType(forward, model)


def _loss(
    chain: Chain,
    chunk: int,
    *,
    labels: Int[Tensor, "batch sequence"],
    input_ids: Int[Tensor, "batch sequence"] | None = None,
    attention_mask: Int[Tensor, "batch sequence"] | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **others: Any,
) -> Float[Tensor, ""]:
    """The loss of one batch; UsageError for arguments that are not supported."""
    unknown = [key for key, value in others.items() if value is not None and value is not _AS_IS.get(key)]
    if unknown or input_ids is None:
        given = f", and not {', '.join(unknown)}" if unknown else ""
        problem = f"Talik's loss takes input_ids, attention_mask and labels{given}"
        raise UsageError(
            problem, remedy="Pass the tokens as input_ids, and remove other columns from the batch."
        )
    skeleton = chain.skeleton(input_ids, attention_mask)
    cut, count = _cut(chain), len(chain.layers)
    with torch.no_grad():
        hidden = run_layers(chain, range(cut), skeleton.embedded, skeleton.calls)
    hidden = run_layers(chain, range(cut, count), hidden.detach(), skeleton.calls)
    loss = chunked_loss(chain, hidden, labels, chunk)
    if num_items_in_batch is None:
        return loss
    return loss * ((labels[:, 1:] != -100).sum() / num_items_in_batch)


def _cut(chain: Chain) -> int:
    """The lowest layer that must be in the graph: it is trained, or shares state with a trained one."""
    named = chain.model.named_parameters()
    if "embeddings" in {chain.parts.part(name) for name, weight in named if weight.requires_grad}:
        raise UsageError(
            "the embeddings require a gradient, which puts every layer into the graph",
            remedy="Call talik.freeze on the model first.",
        )
    return chain.lowest_cut(first_trained_layer(chain))[0]
