"""The ways to carry out a run, and the settings that all of them share."""

from __future__ import annotations

from typing import Any

import torch

from talik.base.errors import UsageError
from talik.base.events import Notify, Status, silent
from talik.base.system import free_memory
from talik.machine.device import choose_device
from talik.model.anatomy import anatomy_of
from talik.model.chain.chain import Chain
from talik.model.folder import ModelFolder
from talik.model.freeze import freeze_for
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe, check_layers
from talik.training.loading import working_dtype

LOGITS_AT_ONCE = 128 << 20  # bytes of the bf16 logits of one chunk and of their gradient
CHUNK, LEAST_CHUNK = 256, 128  # trained positions: fewer read the head too often, more exceed the CPU caches
THRIFTY = {"micro_batch_tokens": 256, "loss_chunk": LEAST_CHUNK, "hidden_bytes": 64 << 20}
STREAMED = {"top": "streamed", "recompute": True}
ON_DISK = {"state": "disk", "inputs": "disk"}
IN_RAM = {"state": "ram", "inputs": "ram"}
# Settings that differ between ways. They change only the order of sums.
RESIDENT_WAYS: tuple[dict[str, Any], ...] = (
    *({"recompute": r, "micro_batch_tokens": tokens} for r in (False, True) for tokens in (2048, 1024, 512)),
    {"recompute": True, **THRIFTY},
)
STREAMED_WAYS: tuple[dict[str, Any], ...] = (
    *({**STREAMED, "micro_batch_tokens": tokens} for tokens in (2048, 512)),
    *({**STREAMED, **ON_DISK, "micro_batch_tokens": tokens} for tokens in (2048, 512)),
    {**STREAMED, **ON_DISK, **THRIFTY},
)
# For devices with their own memory: host RAM is faster than disk.
WAYS_WITH_RAM: tuple[dict[str, Any], ...] = (
    *({"recompute": True, "state": "ram", "micro_batch_tokens": tokens} for tokens in (2048, 512)),
    *({**STREAMED, **IN_RAM, "micro_batch_tokens": tokens} for tokens in (2048, 512)),
    {**STREAMED, **IN_RAM, **THRIFTY},
    {**STREAMED, **ON_DISK, **THRIFTY},
)


def choose(recipe: Recipe, model: ModelFolder, notify: Notify = silent) -> Plan:
    """A plan by rules only, for runs without training and for loops of your own.

    Raises:
        UsageError: The model has fewer layers than the recipe trains.
        ChainError: The model cannot be run as a chain.
    """
    check_layers(recipe, model.layers)
    device = choose_device(recipe.device)
    chain = Chain(model.hollow(working_dtype(recipe)), "cpu")
    return first_plan(recipe, chain, str(device), _free_memory(device), notify)


def wanted_cut(recipe: Recipe, chain: Chain) -> int:
    """The first layer that a gradient reaches; raises UsageError for embeddings that cannot be trained."""
    wanted = recipe.thawed(len(chain.layers))
    if "embeddings" in wanted.parts and chain.calls_need_embeddings:
        problem = f"{type(chain.model).__name__} passes token embeddings into every layer"
        raise UsageError(
            f"{problem}, so its embeddings cannot be trained", remedy="Leave them out of --thaw."
        )
    return wanted.cut


def check_plan(plan: Plan, recipe: Recipe, model: ModelFolder) -> None:
    """Raises UsageError if a plan does not fit this recipe, model and machine."""
    choose_device(plan.device)
    check_layers(recipe, model.layers)
    hollow = model.hollow(working_dtype(recipe))
    freeze_for(hollow, recipe)  # raises for parts that cannot be trained
    chain = Chain(hollow, "cpu")
    cut, _ = chain.lowest_cut(wanted_cut(recipe, chain))
    remedy = "Leave --plan out, or name the plan.json of a run with this model that trains the same."
    if (plan.layers, plan.cut) != (len(chain.layers), cut):
        raise UsageError(
            f"the plan is for {plan.layers} layers cut at {plan.cut}, and this run has {len(chain.layers)} "
            f"layers cut at {cut}",
            remedy=remedy,
        )
    if (plan.cache == "none") != ("embeddings" in recipe.thawed(plan.layers).parts):
        whose = "are not" if plan.cache == "disk" else "are"
        raise UsageError(f"the plan is for a run whose embeddings {whose} trained", remedy=remedy)


def first_plan(recipe: Recipe, chain: Chain, device: str, memory: int, notify: Notify = silent) -> Plan:
    """The fastest plan, without regard to the memory of the top; `memory` in bytes limits the trunk."""
    layers = len(chain.layers)
    wanted, parts = wanted_cut(recipe, chain), recipe.thawed(layers).parts
    cut, reason = chain.lowest_cut(wanted)
    if reason:
        notify(Status("cut", f"moved from layer {wanted} to {cut}: {reason}"))
    trunk = recipe.trunk
    if trunk == "auto":  # resident if the model leaves room
        size = anatomy_of(chain.model).parameters * working_dtype(recipe).itemsize
        trunk = "resident" if size < memory // 2 else "streamed"
    return Plan(
        device=device,
        threads=torch.get_num_threads(),
        cut=cut,
        layers=layers,
        trunk=trunk,
        top="resident",
        cache="none" if "embeddings" in parts else "disk",
        trunk_batch_tokens=2048,
        hidden_bytes=max(64 << 20, min(1 << 30, memory // 16)),
        micro_batch_tokens=2048,
        recompute=False,
        loss_chunk=_loss_chunk(recipe, chain, bool(parts & {"head", "embeddings"})),
    )


def _loss_chunk(recipe: Recipe, chain: Chain, head: bool) -> int:
    """Trained positions per chunk; more for a trained head, whose whole gradient every chunk computes."""
    text, chunk = chain.model.config.get_text_config(decoder=True), CHUNK
    if head and recipe.lora is None:
        chunk = max(chunk, min(1024, LOGITS_AT_ONCE // (4 * text.vocab_size)))
    return min(chunk, getattr(text, "max_position_embeddings", None) or chunk)  # the tail looks up positions


def ways_of(first: Plan, longest: int, *, streamed: bool = True) -> list[dict[str, Any]]:
    """The changes of each way to the first plan, fastest first: recomputation is slow, files are slower.

    A loss chunk is never made larger; a micro-batch is never smaller than the `longest` example. Without
    `streamed`, the top stays in the device's memory in all ways.
    """
    more = STREAMED_WAYS if first.device == "cpu" else WAYS_WITH_RAM
    chunk = {"loss_chunk": min(first.loss_chunk, LEAST_CHUNK)}
    every = RESIDENT_WAYS + (more if streamed else ())
    found = [{**way, **(chunk if "loss_chunk" in way else {})} for way in every]
    differ = {
        (
            *(w.get(what) for what in ("recompute", "top", "state")),
            "loss_chunk" in w,
            max(longest, w["micro_batch_tokens"]),
        ): w
        for w in found[::-1]
    }
    return list(differ.values())[::-1]


def in_words(way: dict[str, Any]) -> str:
    """A way in words, as in "micro-batches of 512 tokens, layers recomputed in the backward"."""
    recomputed = ", layers recomputed in the backward" if way["recompute"] else ""
    apart = {"ram": " in host RAM", "disk": " on disk"}.get(way.get("state", "memory"), "")
    if way.get("top") == "streamed":
        offloaded = f", optimizer state and layer inputs{apart}" if apart else ""
        recomputed = f", trained layers streamed from a working copy{offloaded}"
    elif apart:
        recomputed += f", optimizer state{apart}"
    chunk = f", loss chunks of {way['loss_chunk']}" if "loss_chunk" in way else ""
    return f"micro-batches of {way['micro_batch_tokens']:,} tokens{recomputed}{chunk}"


def _free_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cpu":
        return free_memory()
    return torch.accelerator.get_memory_info(device)[0]
