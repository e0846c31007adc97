"""Runs the frozen trunk once over the data: its hidden states do not change, so every epoch reads them back.

A shard is as much data as the budget for hidden states allows. Layer after layer runs over a whole shard, so
that each layer's weights are read once per shard. Examples of equal length go through together, unpadded, in
batch groups that depend only on the data and `trunk_batch_tokens`: a hidden state depends on the batch it was
computed in.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from talik.base.events import Notify, Progress, Status
from talik.base.files import format_bytes, need_room
from talik.data.examples import Example
from talik.kernels.bf16_matmul import fp32_in_use
from talik.model.block import EMBEDDINGS, Block
from talik.model.chain.chain import Call, Chain
from talik.model.chain.forms import tensors_in
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.training.loading import RunModel
from talik.training.memory.store import Store
from talik.training.trunk.cache import BatchGroup, Cache, CachedStates, groups_of, open_cache
from talik.training.trunk.cache_folder import default_root, make_room
from talik.training.trunk.interfaces import StatesCache


@dataclass(frozen=True, slots=True)
class TrunkInput:
    """A batch group, and the examples that its indices refer to."""

    group: BatchGroup
    examples: Sequence[Example]


@dataclass(slots=True)
class GroupState:
    """A batch group between two layers: its hidden states and the arguments of every layer."""

    group: BatchGroup
    hidden: Float[Tensor, "batch sequence width"]
    calls: tuple[Call, ...]

    @property
    def bytes(self) -> int:
        """The memory that it takes between two layers."""
        tensors = tensors_in([self.hidden, *((call.args, call.kwargs) for call in self.calls)])
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({s._cdata: s.nbytes() for s in storages}.values())


def trunk_pass(
    chain: Chain,
    plan: Plan,
    work: Iterable[TrunkInput],
    store: Store,
    cache: StatesCache,
    notify: Notify,
) -> None:
    """Runs batch groups through the layers below the cut, and writes their hidden states to the cache.

    A shard is completed before the next begins, so that an interrupted pass can continue after it. A streamed
    layer is read once for all batch groups of a shard. If the layers stay in memory, a batch group goes
    through all of them before the next one starts: oneDNN then compiles for its shapes once.
    """
    queue, cut = deque(work), plan.cut
    total, done = sum(each.group.tokens for each in queue), 0
    while queue:
        shard = _embed(chain, cut, queue, store, plan.hidden_bytes)
        tokens = sum(state.group.tokens for state in shard)
        with cache.new_shard([state.group for state in shard]) as writer:  # checks the disk before the work
            rounds = [[state] for state in shard] if plan.trunk == "resident" else [shard]
            for number, layer in itertools.product(range(len(rounds)), range(cut)):
                _run_layer(chain, layer, cut, rounds[number], store)
                share = (number * cut + layer + 1) / (len(rounds) * cut)
                notify(Progress("trunk", done + int(tokens * share), total))
            if queue and cut:
                store.read_ahead(Block.layer(0))
            for state in shard:
                writer.write(state.group, state.hidden)
        done += tokens


def _embed(
    chain: Chain,
    cut: int,
    queue: deque[TrunkInput],
    store: Store,
    budget: int,
) -> list[GroupState]:
    """Takes batch groups from the queue until their memory reaches the budget (at least one); embeds them."""
    store.get(EMBEDDINGS)
    if cut:
        store.read_ahead(Block.layer(0))
    shard: list[GroupState] = []
    held = 0
    while queue and (not shard or held < budget):
        each = queue.popleft()
        rows = [list(each.examples[i].input_ids) for i in each.group.indices]
        skeleton = chain.skeleton(torch.tensor(rows, device=chain.device))
        shard.append(GroupState(each.group, skeleton.embedded, skeleton.calls[:cut]))
        held += shard[-1].bytes
    store.release(EMBEDDINGS)
    return shard


def _run_layer(chain: Chain, layer: int, cut: int, states: Sequence[GroupState], store: Store) -> None:
    """Runs one layer over batch groups, while the weights of the next layer are read."""
    store.get(Block.layer(layer))
    if layer + 1 < cut:
        store.read_ahead(Block.layer(layer + 1))
    for state in states:
        with torch.inference_mode():
            state.hidden = chain.layer(layer, state.hidden, state.calls[layer])
    store.release(Block.layer(layer))


@contextmanager
def trunk_states(
    loaded: RunModel, sets: Sequence[Sequence[Example]], recipe: Recipe, notify: Notify
) -> Iterator[list[CachedStates | None]]:
    """Opens the trunk's hidden states of each set of examples; computes those that are not in the cache.

    Yields None for each set if there is no trunk.
    """
    plan, chain, cut = loaded.plan, loaded.chain, loaded.plan.cut
    if plan.cache == "none":
        with loaded.trunk() as store:
            _check(loaded, sets[0], store, notify)
        yield [None] * len(sets)
        return
    facts = trunk_facts(chain, cut, loaded.weights.fingerprint(loaded.weights.trunk_names(cut)), plan)
    width, dtype = chain.width_at(cut), chain.dtype_at(cut)
    cache = open_cache(cache_root(recipe), facts, width, dtype, model=recipe.model, notify=notify)
    groups = [groups_of(examples, plan.trunk_batch_tokens) for examples in sets]
    with cache.writing():
        if work := _missing(cache, groups, sets):
            _make_room(cache, work, recipe, notify)
            _run(loaded, work, cache, notify)
        else:
            tokens = sum(group.tokens for set_groups in groups for group in set_groups)
            notify(Status("trunk", f"all {tokens:,} tokens are in the cache"))
    with ExitStack() as stack:
        yield [stack.enter_context(cache.states(set_groups)) for set_groups in groups]


def _make_room(cache: Cache, work: Sequence[TrunkInput], recipe: Recipe, notify: Notify) -> None:
    """Removes old caches as `cache_gb` demands, and checks the disk for room."""
    root, needed = cache_root(recipe), cache.size([each.group for each in work])
    for removed in make_room(root, needed, recipe.cache_gb * 1e9, cache.folder):
        notify(Status("cache", f"removed the least recently used cache: {removed.path}"))
    need_room(root, needed, "the trunk's cache")


def _missing(
    cache: Cache, groups: Sequence[Sequence[BatchGroup]], sets: Sequence[Sequence[Example]]
) -> list[TrunkInput]:
    """The batch groups that are not in the cache, each once."""
    missing = {group.digest for group in cache.missing([group for of_set in groups for group in of_set])}
    work: list[TrunkInput] = []
    for set_groups, examples in zip(groups, sets, strict=True):
        for group in set_groups:
            if group.digest in missing:
                missing.remove(group.digest)
                work.append(TrunkInput(group, examples))
    return work


def _run(loaded: RunModel, work: Sequence[TrunkInput], cache: Cache, notify: Notify) -> None:
    """Checks the chain, runs the pass, and reports tokens and seconds."""
    traffic = loaded.store.traffic
    with loaded.trunk() as store:
        _check(loaded, work[0].examples, store, notify)
        start, waited, read = time.perf_counter(), traffic.waited, traffic.bytes
        trunk_pass(loaded.chain, loaded.plan, work, store, cache, notify)
        seconds = time.perf_counter() - start
    tokens = sum(each.group.tokens for each in work)
    text = f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} a second"
    if loaded.plan.trunk == "streamed":
        waited = traffic.waited - waited
        text += f"; read {format_bytes(traffic.bytes - read)} of weights, waited {waited:.1f} s for them"
    notify(Status("trunk", text))


def _check(loaded: RunModel, examples: Sequence[Example], store: Store, notify: Notify) -> None:
    loaded.check_chain(examples, store)
    notify(Status("chain", "gives exactly what the model's own forward gives (checked on a few tokens)"))


def cache_root(recipe: Recipe) -> Path:
    """The folder of all caches: that of the recipe, or the default."""
    return Path(recipe.cache) if recipe.cache else default_root()


def trunk_facts(chain: Chain, cut: int, weights: str, plan: Plan) -> dict[str, Any]:
    """Everything except for the tokens that the trunk's hidden states depend on, as values of JSON.

    `weights` is the hash of the trunk's weights.
    """
    config: dict[str, Any] = chain.model.config.to_dict()
    names = ("_name_or_path", "name_or_path", "transformers_version", "use_cache")
    return {
        "weights": weights,
        "config": {key: str(value) for key, value in config.items() if key not in names},
        "cut": cut,
        "computed_in": str(chain.dtype),
        "kernels": str(chain.model.config._attn_implementation),
        "products": "as fp32" if fp32_in_use() else "as they are",
        "device": _device_name(plan.device),
        "threads": plan.threads,
        "trunk_batch_tokens": plan.trunk_batch_tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _device_name(device: str) -> str:
    """The device and its instruction set or model: another processor may round differently."""
    if torch.device(device).type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{device} {torch.accelerator.current_accelerator()}"
