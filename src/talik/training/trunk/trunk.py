"""The frozen trunk, run once: what it hands on is a constant of each token, so every epoch reads it back.

Layer by layer over all the data that fits the hidden-state budget (a shard), so that each layer's weights are
read once per shard. Examples of equal length go through together, unpadded, in groups that the data and
`trunk_batch_tokens` fix: a hidden state depends on the batch that it was computed in, and on nothing else.
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
from jaxtyping import Float, Int
from torch import Tensor

from talik.base.events import Notify, Progress, Status
from talik.base.files import format_bytes, need_room
from talik.data.examples import Example
from talik.kernels.bf16_matmul import fp32_in_use
from talik.model.chain.chain import Call, Chain, run_layers
from talik.model.chain.probe import tensors_in
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.training.loading import RunModel
from talik.training.memory.store import Store
from talik.training.trunk.cache import Cache, Group, States, groups_of, open_cache
from talik.training.trunk.cache_folder import default_root, make_room


@dataclass(slots=True)
class Flow:
    """One group on its way through the layers."""

    group: Group
    hidden: Float[Tensor, "batch sequence width"]
    calls: tuple[Call, ...]

    @property
    def bytes(self) -> int:
        """What is held for it between two layers."""
        tensors = tensors_in([self.hidden, *((call.args, call.kwargs) for call in self.calls)])
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({s._cdata: s.nbytes() for s in storages}.values())


def run_trunk(
    chain: Chain, cut: int, input_ids: Int[Tensor, "batch sequence"]
) -> Float[Tensor, "batch sequence width"]:
    """What the layers below the cut hand on for unpadded examples, on the model's device."""
    skeleton = chain.skeleton(input_ids)
    with torch.inference_mode():
        return run_layers(chain, range(cut), skeleton.embedded, skeleton.calls)


def trunk_pass(
    chain: Chain,
    plan: Plan,
    work: Iterable[tuple[Group, Sequence[Example]]],
    store: Store,
    cache: Cache,
    notify: Notify,
) -> None:
    """Runs groups, each with the examples it indexes, through the layers below the cut into the cache.

    A shard is finished before the next begins, so that a pass that was stopped goes on behind it. A streamed
    layer is read once for all groups of a shard. Where layers stay in memory a group goes through all of them
    at once: oneDNN's programs for its shapes are made once.
    """
    waiting, cut = deque(work), plan.cut
    total, done = sum(group.tokens for group, _ in waiting), 0
    while waiting:
        flows = _embed(chain, cut, waiting, store, plan.hidden_bytes)
        tokens = sum(flow.group.tokens for flow in flows)
        with cache.new_shard([flow.group for flow in flows]) as writer:  # room is checked before the work
            at_once = [[flow] for flow in flows] if plan.trunk == "resident" else [flows]
            for number, layer in itertools.product(range(len(at_once)), range(cut)):
                _run_layer(chain, layer, cut, at_once[number], store)
                share = (number * cut + layer + 1) / (len(at_once) * cut)
                notify(Progress("trunk", done + int(tokens * share), total))
            if waiting and cut:
                store.read_ahead("layer 0")
            for flow in flows:
                writer.write(flow.group, flow.hidden)
        done += tokens


def _embed(
    chain: Chain,
    cut: int,
    waiting: deque[tuple[Group, Sequence[Example]]],
    store: Store,
    budget: int,
) -> list[Flow]:
    """Takes groups until what is held for them between layers reaches the budget; one at least."""
    store.get("embeddings")
    if cut:
        store.read_ahead("layer 0")
    flows: list[Flow] = []
    held = 0
    while waiting and (not flows or held < budget):
        group, examples = waiting.popleft()
        ids = torch.tensor([list(examples[i].input_ids) for i in group.indices], device=chain.device)
        skeleton = chain.skeleton(ids)
        flows.append(Flow(group, skeleton.embedded, skeleton.calls[:cut]))
        held += flows[-1].bytes
    store.release("embeddings")
    return flows


def _run_layer(chain: Chain, layer: int, cut: int, flows: Sequence[Flow], store: Store) -> None:
    """One layer over all groups of a shard, while the next layer's weights are read."""
    store.get(f"layer {layer}")
    if layer + 1 < cut:
        store.read_ahead(f"layer {layer + 1}")
    for flow in flows:
        with torch.inference_mode():
            flow.hidden = chain.layer(layer, flow.hidden, flow.calls[layer])
    store.release(f"layer {layer}")


@contextmanager
def trunk_states(
    loaded: RunModel, sets: Sequence[Sequence[Example]], recipe: Recipe, notify: Notify
) -> Iterator[list[States | None]]:
    """What the trunk hands on for each set of examples: from the cache, and by one pass what is not in it.

    None where there is no trunk.
    """
    plan, chain, cut = loaded.plan, loaded.chain, loaded.plan.cut
    if plan.cache == "none":
        with loaded.trunk() as store:
            _check(loaded, sets[0], store, notify)
        yield [None] * len(sets)
        return
    weights = loaded.weights.fingerprint(loaded.weights.trunk_names(cut))
    facts = trunk_facts(chain, cut, weights, plan)
    root, width = cache_root(recipe), chain.width_at(cut)
    cache = open_cache(root, facts, width, chain.dtype_at(cut), model=recipe.model, notify=notify)
    groups = [groups_of(examples, plan.trunk_batch_tokens) for examples in sets]
    with cache.writing():
        work = _missing(cache, groups, sets)
        all_tokens = sum(group.tokens for of_set in groups for group in of_set)
        if work:
            needed = cache.size([group for group, _ in work])
            for removed in make_room(root, needed, recipe.cache_gb * 1e9, cache.folder):
                notify(Status("cache", f"{removed.path} was used least lately and is removed"))
            need_room(root, needed, "the trunk's cache")
            _run(loaded, work, cache, notify)
        else:
            notify(Status("trunk", f"its {all_tokens:,} tokens are in the cache already"))
    with ExitStack() as stack:
        yield [stack.enter_context(cache.states(of_set)) for of_set in groups]


def _missing(
    cache: Cache, groups: Sequence[Sequence[Group]], sets: Sequence[Sequence[Example]]
) -> list[tuple[Group, Sequence[Example]]]:
    """The groups that have to be computed, each once, with the examples that it indexes."""
    wanted = {group.digest for group in cache.missing([group for of_set in groups for group in of_set])}
    work = []
    for of_set, examples in zip(groups, sets, strict=True):
        for group in of_set:
            if group.digest in wanted:
                wanted.remove(group.digest)
                work.append((group, examples))
    return work


def _run(
    loaded: RunModel, work: Sequence[tuple[Group, Sequence[Example]]], cache: Cache, notify: Notify
) -> None:
    """Checks the chain, runs the pass, and says what it took."""
    traffic = loaded.store.traffic
    with loaded.trunk() as store:
        _check(loaded, work[0][1], store, notify)
        start, waited, read = time.perf_counter(), traffic.waited, traffic.bytes
        trunk_pass(loaded.chain, loaded.plan, work, store, cache, notify)
        seconds = time.perf_counter() - start
    tokens = sum(group.tokens for group, _ in work)
    text = f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} a second"
    if loaded.plan.trunk == "streamed":
        text += (
            f"; {format_bytes(traffic.bytes - read)} of weights read, {traffic.waited - waited:.1f} s waited"
        )
    notify(Status("trunk", text))


def _check(loaded: RunModel, examples: Sequence[Example], store: Store, notify: Notify) -> None:
    loaded.check_chain(examples, store)
    notify(Status("chain", "gives exactly what the model's own forward gives (checked on a few tokens)"))


def cache_root(recipe: Recipe) -> Path:
    """The folder of all caches: the recipe's, or Talik's own."""
    return Path(recipe.cache) if recipe.cache else default_root()


def trunk_facts(chain: Chain, cut: int, weights: str, plan: Plan) -> dict[str, Any]:
    """Everything but the tokens that what the trunk hands on depends on; `weights` names the trunk's."""
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
    """The device and what it can do: another processor may round differently."""
    if torch.device(device).type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{device} {torch.accelerator.current_accelerator()}"
