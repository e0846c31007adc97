"""The ways to carry out a run, and the settings that all of them share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast

import torch

from talik.base.errors import UsageError
from talik.base.events import Notify, Status, silent
from talik.base.system import free_memory
from talik.machine.device import choose_device
from talik.model.anatomy import anatomy_of
from talik.model.chain.chain import Chain
from talik.model.folder import ModelFolder
from talik.model.freeze import freeze_for
from talik.recipe.plan import Plan, Tier
from talik.recipe.recipe import Recipe, check_layers
from talik.training.loading import working_dtype

LOGITS_AT_ONCE = 128 << 20  # bytes of the bf16 logits of one chunk and of their gradient
CHUNK, LEAST_CHUNK = 256, 128  # trained positions: fewer read the head too often, more exceed the CPU caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """The settings that differ between ways to run. They change the results only by the order of sums.

    Attributes:
        top: See `Plan.top`.
        recompute: See `Plan.recompute`.
        state: See `Plan.state`.
        inputs: See `Plan.inputs`.
        micro_batch_tokens: See `Plan.micro_batch_tokens`.
        loss_chunk: See `Plan.loss_chunk`; None keeps that of the plan.
        hidden_bytes: See `Plan.hidden_bytes`; None keeps those of the plan.
    """

    top: Literal["resident", "streamed"] = "resident"
    recompute: bool = True
    state: Tier = "memory"
    inputs: Tier = "memory"
    micro_batch_tokens: int
    loss_chunk: int | None = None
    hidden_bytes: int | None = None

    def apply(self, plan: Plan) -> Plan:
        """The plan with the settings of this way."""
        return plan.model_copy(update={k: v for k, v in asdict(self).items() if v is not None})

    def as_dict(self) -> dict[str, Any]:
        """Micro-batches, recomputation, and all other settings that differ from the defaults, for JSON."""
        shown = {"recompute", "micro_batch_tokens"}
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in shown or getattr(self, field.name) != field.default
        }

    def __str__(self) -> str:
        """For example "micro-batches of 512 tokens, layers recomputed in the backward"."""
        parts = [f"micro-batches of {self.micro_batch_tokens:,} tokens", *self._memory_savings()]
        if self.loss_chunk is not None:
            parts.append(f"loss chunks of {self.loss_chunk}")
        return ", ".join(parts)

    def _memory_savings(self) -> Iterator[str]:
        place = {"memory": "", "ram": " in host RAM", "disk": " on disk"}[self.state]
        if self.top == "streamed":
            yield "trained layers streamed from a working copy"
        elif self.recompute:
            yield "layers recomputed in the backward"
        if place:
            offloaded = "optimizer state" if self.top == "resident" else "optimizer state and layer inputs"
            yield f"{offloaded}{place}"


def way_of(plan: Plan) -> Way:
    """The way of a plan, with its loss chunk."""
    return Way(
        top=plan.top,
        recompute=plan.recompute,
        state=plan.state,
        inputs=plan.inputs,
        micro_batch_tokens=plan.micro_batch_tokens,
        loss_chunk=plan.loss_chunk,
    )


def _thrifty(**settings: Any) -> Way:
    """A way with the smallest micro-batches, loss chunks and shards of the cache."""
    return Way(micro_batch_tokens=256, loss_chunk=LEAST_CHUNK, hidden_bytes=64 << 20, **settings)


RESIDENT_WAYS = (
    *(Way(recompute=r, micro_batch_tokens=tokens) for r in (False, True) for tokens in (2048, 1024, 512)),
    _thrifty(),
)
STREAMED_WAYS = (
    *(Way(top="streamed", micro_batch_tokens=tokens) for tokens in (2048, 512)),
    *(Way(top="streamed", state="disk", inputs="disk", micro_batch_tokens=tokens) for tokens in (2048, 512)),
    _thrifty(top="streamed", state="disk", inputs="disk"),
)
# For devices with their own memory: host RAM is faster than disk.
WAYS_WITH_RAM = (
    *(Way(state="ram", micro_batch_tokens=tokens) for tokens in (2048, 512)),
    *(Way(top="streamed", state="ram", inputs="ram", micro_batch_tokens=tokens) for tokens in (2048, 512)),
    _thrifty(top="streamed", state="ram", inputs="ram"),
    _thrifty(top="streamed", state="disk", inputs="disk"),
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
    config, chunk = cast(Any, chain.model.config), CHUNK
    text = config.get_text_config(decoder=True)
    if head and recipe.lora is None:
        chunk = max(chunk, min(1024, LOGITS_AT_ONCE // (4 * text.vocab_size)))
    return min(chunk, getattr(text, "max_position_embeddings", None) or chunk)  # the tail looks up positions


def ways_of(first: Plan, longest: int, *, streamed: bool = True) -> list[Way]:
    """The ways to run, fastest first: recomputation is slow, files are slower.

    Args:
        first: The plan that the ways change. Loss chunks are never made larger than in this plan.
        longest: Tokens of the longest example, which limit micro-batches from below. Of several ways with
            the same micro-batches only one is returned.
        streamed: Whether the trained layers may leave the memory of the device.
    """
    streamed_ways = STREAMED_WAYS if first.device == "cpu" else WAYS_WITH_RAM
    distinct: dict[Way, Way] = {}
    for way in RESIDENT_WAYS + (streamed_ways if streamed else ()):
        if way.loss_chunk is not None:
            way = replace(way, loss_chunk=min(first.loss_chunk, way.loss_chunk))
        effective = replace(way, micro_batch_tokens=max(longest, way.micro_batch_tokens))
        distinct.setdefault(effective, way)
    return list(distinct.values())


def _free_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cpu":
        return free_memory()
    return torch.accelerator.get_memory_info(device)[0]
