"""Chooses how a run is carried out."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from talik.errors import UsageError
from talik.machine import choose_device
from talik.recipe import Plan, Recipe

LOGITS_AT_ONCE = 128 << 20  # bytes of one chunk's fp32 logits


def choose(recipe: Recipe, config: PreTrainedConfig) -> Plan:
    """The plan for this recipe on this machine. UsageError if the model has fewer layers than asked for."""
    text = config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    if recipe.top_layers > layers:
        raise UsageError(
            f"top_layers is {recipe.top_layers}, and {recipe.model} has {layers} layers",
            remedy=f"Choose --top-layers between 1 and {layers}.",
        )
    return Plan(
        device=str(choose_device(recipe.device)),
        threads=torch.get_num_threads(),
        cut=layers - recipe.top_layers,
        layers=layers,
        trunk="resident",
        top="resident",
        cache="disk",
        trunk_batch_tokens=2048,
        micro_batch_tokens=2048,
        loss_chunk=min(
            max(64, min(1024, LOGITS_AT_ONCE // (4 * text.vocab_size))),
            getattr(text, "max_position_embeddings", None) or 1024,  # the tail looks positions up, too
        ),
    )
