"""A model of Transformers whose own forward gives the loss as Talik computes it, for whoever calls it.

Trainers and loops call `model(input_ids=..., attention_mask=..., labels=...)` and want `loss`. That is all
that changes: the model stays of its class, with its weights, `generate` and `save_pretrained`.
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

# What a caller may say beside the tokens, as it is in any case.
_AS_IS = {"use_cache": False, "return_dict": True, "output_attentions": False, "output_hidden_states": False}


def drop_in(model: PreTrainedModel, chunk: int = 256) -> None:
    """From now on the model's loss keeps the frozen trunk out of the graph, and logits to `chunk` positions.

    `model(input_ids=..., attention_mask=..., labels=...)` gives an output with `loss` alone; `logits` is
    None. Labels stand on their tokens, -100 where masked; the loss is the mean over the trained tokens, or
    their sum divided by `num_items_in_batch`, as a Trainer asks for it. Without labels the forward is the
    model's own. What requires a gradient when it is called is trained (`talik.freeze`); dropout is on where
    the model is in training mode, in the trunk too. Raises ChainError for a model that cannot be run layer by
    layer; UsageError for one whose forward was replaced already, for embeddings that require a gradient, and
    for arguments that this loss has no place for.
    """
    if "forward" in vars(model):
        problem = f"the forward of this {type(model).__name__} was replaced already"
        raise UsageError(problem, remedy="Call talik.drop_in once, before other libraries wrap the model.")
    own = type(model).forward
    held: Any = model
    held.talik_chain = Chain(model)  # on the model, so that a deep copy has a chain of its own
    # Not what others wrap around the forward below: autocast that is entered twice is never left.
    held.talik_chain.forward = MethodType(own, model)

    @wraps(own)  # a Trainer keeps the columns that the signature names
    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return own(self, *args, **kwargs)
        if args:
            raise UsageError("with labels, this model takes its arguments by name: input_ids=...")
        return CausalLMOutputWithPast(loss=_loss(self.talik_chain, chunk, labels=labels, **kwargs))  # pyright: ignore[reportArgumentType]

    held.forward = MethodType(forward, model)


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
    strange = [key for key, value in others.items() if value is not None and value is not _AS_IS.get(key)]
    if strange or input_ids is None:
        given = f", and not {', '.join(strange)}" if strange else ""
        problem = f"Talik's loss takes input_ids, attention_mask and labels{given}"
        raise UsageError(problem, remedy="Give the tokens as input_ids, and leave the rest out of the batch.")
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
    """Below it nothing requires a gradient, and no layer shares what one above computes with."""
    named = chain.model.named_parameters()
    if "embeddings" in {chain.parts.part(name) for name, weight in named if weight.requires_grad}:
        raise UsageError(
            "the embeddings require a gradient, so that every layer would be in the graph",
            remedy="Call talik.freeze on the model first.",
        )
    return chain.lowest_cut(first_trained_layer(chain))[0]
