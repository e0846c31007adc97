"""Chooses how a run is carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig

from talik.errors import UsageError
from talik.events import Notify, Said, silent
from talik.machine import choose_device
from talik.model.anatomy import anatomy_of
from talik.model.chain import Chain
from talik.model.hollow import hollow_model
from talik.recipe import Plan, Recipe
from talik.system import free_memory
from talik.train.loading import working_dtype

LOGITS_AT_ONCE = 128 << 20  # bytes of one chunk's fp32 logits


def choose(recipe: Recipe, folder: Path, notify: Notify = silent) -> Plan:
    """The plan for this recipe and the model in a folder, on this machine.

    UsageError if the model has fewer layers than asked for, ChainError if it cannot be run layer by layer.
    """
    text = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config(decoder=True)
    check_layers(recipe, text.num_hidden_layers)
    return plan_for(recipe, Chain(hollow_model(folder, working_dtype(recipe)), "cpu"), notify)


def check_layers(recipe: Recipe, layers: int) -> None:
    """UsageError if the recipe trains more layers than a model has."""
    if recipe.top_layers > layers:
        raise UsageError(
            f"top_layers is {recipe.top_layers}, and {recipe.model} has {layers} layers",
            remedy=f"Choose --top-layers between 1 and {layers}.",
        )


def plan_for(recipe: Recipe, chain: Chain, notify: Notify = silent) -> Plan:
    """The plan that needs no search: as fast as can be, by fixed rules."""
    text, layers = chain.model.config.get_text_config(decoder=True), len(chain.layers)
    device = choose_device(recipe.device)
    cut, reason = chain.lowest_cut(layers - recipe.top_layers)
    if reason:
        notify(Said("cut", f"moved from layer {layers - recipe.top_layers} to {cut}: {reason}"))
    free = _free_memory(device)
    return Plan(
        device=str(device),
        threads=torch.get_num_threads(),
        cut=cut,
        layers=layers,
        trunk=_trunk(recipe, chain, free),
        top="resident",
        cache="disk",
        trunk_batch_tokens=2048,
        hidden_bytes=max(64 << 20, min(1 << 30, free // 16)),
        micro_batch_tokens=2048,
        recompute=False,
        loss_chunk=min(
            max(64, min(1024, LOGITS_AT_ONCE // (4 * text.vocab_size))),
            getattr(text, "max_position_embeddings", None) or 1024,  # the tail looks positions up, too
        ),
    )


def _trunk(recipe: Recipe, chain: Chain, free: int) -> Literal["resident", "streamed"]:
    """In memory where the whole model leaves room for what trains: every step would wait for nothing less."""
    if recipe.trunk != "auto":
        return recipe.trunk
    size = anatomy_of(chain.model).parameters * working_dtype(recipe).itemsize
    return "resident" if size < free // 2 else "streamed"


def _free_memory(device: torch.device) -> int:
    """Bytes that this machine could give now."""
    if device.type == "cpu":
        return free_memory()
    return torch.accelerator.get_memory_info(device)[0]
