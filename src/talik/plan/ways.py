"""The ways to carry out a run, and the settings that all of them share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Literal

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


@dataclass(frozen=True, slots=True)
class Way:
    """How a run saves memory. Ways differ only in the order of sums; None leaves a setting of the first plan.

    `str` gives it in words, as in "micro-batches of 512 tokens, layers recomputed in the backward".
    """

    micro_batch_tokens: int
    recompute: bool = False
    top: Literal["resident", "streamed"] = "resident"
    state: Tier = "memory"
    inputs: Tier = "memory"
    loss_chunk: int | None = None
    hidden_bytes: int | None = None

    def __str__(self) -> str:
        offloaded = {"memory": "", "ram": " in host RAM", "disk": " on disk"}[self.state]
        words = [f"micro-batches of {self.micro_batch_tokens:,} tokens"]
        if self.top == "streamed":
            words.append("trained layers streamed from a working copy")
        elif self.recompute:
            words.append("layers recomputed in the backward")
        if offloaded:
            inputs = " and layer inputs" if self.top == "streamed" else ""
            words.append(f"optimizer state{inputs}{offloaded}")
        if self.loss_chunk:
            words.append(f"loss chunks of {self.loss_chunk}")
        return ", ".join(words)

    def fields(self) -> dict[str, Any]:
        """The settings that this way changes, by the names of Plan."""
        always = ("micro_batch_tokens", "recompute")
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in always or getattr(self, field.name) != field.default
        }

    def apply(self, plan: Plan) -> Plan:
        """The plan carried out in this way."""
        return plan.model_copy(update=self.fields())


def way_of(plan: Plan) -> Way:
    """The way of a plan."""
    names = ("micro_batch_tokens", "recompute", "top", "state", "inputs", "loss_chunk")
    return Way(**{name: getattr(plan, name) for name in names})


_SMALL = Way(256, recompute=True, loss_chunk=LEAST_CHUNK, hidden_bytes=64 << 20)
RESIDENT = (
    *(Way(tokens, recompute=recompute) for recompute in (False, True) for tokens in (2048, 1024, 512)),
    _SMALL,
)
STREAMED = tuple(Way(tokens, recompute=True, top="streamed") for tokens in (2048, 512))
ON_DISK = tuple(replace(way, top="streamed", state="disk", inputs="disk") for way in (*STREAMED, _SMALL))
# For devices with their own memory: host RAM is faster than disk.
STATE_IN_RAM = tuple(Way(tokens, recompute=True, state="ram") for tokens in (2048, 512))
IN_RAM = tuple(replace(way, state="ram", inputs="ram") for way in ON_DISK)


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
    """Trained positions per chunk; more if the head is trained, because each chunk computes its whole
    gradient.
    """
    text, chunk = chain.model.config.get_text_config(decoder=True), CHUNK
    if head and recipe.lora is None:
        chunk = max(chunk, min(1024, LOGITS_AT_ONCE // (4 * text.vocab_size)))
    return min(chunk, getattr(text, "max_position_embeddings", None) or chunk)  # the tail looks up positions


def ways_of(first: Plan, longest: int, *, streamed: bool = True) -> list[Way]:
    """All different ways to carry out a plan, fastest first: recomputation is slow, files are slower.

    Args:
        first: The plan they start from; a loss chunk is never made larger than its own.
        longest: Tokens of the longest example; a micro-batch is never smaller.
        streamed: Whether to include ways in which the top is streamed or offloaded.
    """
    more = (*STREAMED, *ON_DISK) if first.device == "cpu" else (*STATE_IN_RAM, *IN_RAM, ON_DISK[-1])
    different: dict[Way, Way] = {}
    for way in (*RESIDENT, *(more if streamed else ())):
        if way.loss_chunk:
            way = replace(way, loss_chunk=min(first.loss_chunk, way.loss_chunk))
        tokens = max(longest, way.micro_batch_tokens)
        different.setdefault(replace(way, micro_batch_tokens=tokens), way)
    return list(different.values())


def _free_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cpu":
        return free_memory()
    return torch.accelerator.get_memory_info(device)[0]
