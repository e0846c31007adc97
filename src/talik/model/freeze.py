"""Freezes a model except for the trained parts, and keeps the frozen ones out of the graph."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from talik.model.adapters import add_adapters
from talik.model.anatomy import Parts, parts_of
from talik.recipe.lora import parse_lora
from talik.recipe.recipe import Recipe
from talik.recipe.thaw import Thawed, parse_thaw


def freeze(model: PreTrainedModel, thaw: str) -> dict[str, nn.Parameter]:
    """Freezes everything except what `thaw` names: "top.5,norm", "layers.20-27,head", "all".

    A head that shares its matrix with the embeddings gets a copy if it is trained without them; with them,
    the shared matrix is trained in both roles. The hook by which gradient checkpointing makes frozen layers
    part of the graph is removed.

    Returns:
        The trained parameters by their full names.

    Raises:
        UsageError: `thaw` is not written as described, or names layers that the model does not have.
    """
    return _freeze(model, parse_thaw(thaw, parts_of(model).count))


def freeze_for(model: PreTrainedModel, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Freezes everything except what a recipe trains: parts of the model, or adapters without storage."""
    wanted = recipe.thawed(parts_of(model).count)
    if recipe.lora is None:
        return _freeze(model, wanted)
    _freeze(model, replace(wanted, layers=()))
    add_adapters(model, parse_lora(recipe.lora), wanted.layers)
    return trained_parameters(model)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by full name; tied ones by the first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _freeze(model: PreTrainedModel, wanted: Thawed) -> dict[str, nn.Parameter]:
    parts = parts_of(model)
    if wanted.unties:
        untie(model, parts)
    model.disable_input_require_grads()  # pyright: ignore[reportCallIssue]
    model.requires_grad_(False)
    names = {f"layer {index}" for index in wanted.layers} | wanted.parts
    for name, parameter in model.named_parameters():
        parameter.requires_grad = parts.part(name) in names
    return trained_parameters(model)


def untie(model: PreTrainedModel, parts: Parts) -> None:
    """Gives a tied head a copy of the matrix, and changes the config accordingly."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if not parts.tied or head is None:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
