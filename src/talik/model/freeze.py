"""What is trained: the top layers and the final norm; everything else is frozen and out of the graph."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from talik.errors import UsageError
from talik.model.anatomy import Parts, parts_of


def freeze(model: PreTrainedModel, top_layers: int, also: tuple[str, ...] = ()) -> dict[str, nn.Parameter]:
    """Freezes everything but the last `top_layers` layers, the final norm and what `also` names.

    `also=("head",)` trains the head too; a head that shares its weights with the embeddings gets a copy of
    its own first. The embeddings are always frozen, and the hook with which gradient checkpointing puts a
    frozen trunk back into the graph is taken off. Returns the trained parameters by their full names.
    Raises UsageError if the model has fewer layers.
    """
    parts = parts_of(model)
    if top_layers > parts.count:
        raise UsageError(f"top_layers is {top_layers}, and the model has {parts.count} layers")
    if "head" in also:
        untie(model, parts)
    model.disable_input_require_grads()  # pyright: ignore[reportCallIssue]
    model.requires_grad_(False)
    wanted = {f"layer {i}" for i in range(parts.count - top_layers, parts.count)}
    wanted |= {"norm", *also}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = parts.part(name) in wanted
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def untie(model: PreTrainedModel, parts: Parts) -> None:
    """Gives a head that shares the embeddings' weights a copy of its own, and says so in the config."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if not parts.tied or head is None:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
