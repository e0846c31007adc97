"""Runs the real training code on fake tensors, to find its memory before a weight is loaded.

It calls the same functions as a run: the store loads blocks, the trunk runs, and every step has its forward,
backward and update. Only files, threads and values are missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from talik.base.events import silent
from talik.data.examples import Example
from talik.data.preparing.stored_examples import lengths_of
from talik.model.adapters import adapter_weights, empty_adapters
from talik.model.block import EMBEDDINGS, REST, TAIL, Block
from talik.model.chain.chain import Chain
from talik.model.folder import ModelFolder
from talik.model.freeze import freeze_for
from talik.model.weights.safetensors_file import Entry, weight_files
from talik.model.weights.weights import Weights
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe, check_layers
from talik.simulate.account import Simulation, account
from talik.simulate.fake_log import Routing, fake_world
from talik.simulate.fakes import (
    FakeCache,
    FakeCopy,
    FakeStates,
    FakeWeights,
    ImmediateExecutor,
    MarkedScratch,
    assumed_table,
)
from talik.simulate.pending import Pending
from talik.simulate.storage_log import Log
from talik.training.loading import RunModel, new_run_model, working_dtype
from talik.training.memory.store import Store
from talik.training.run.evaluation import evaluate_top
from talik.training.run.feed import run_step
from talik.training.run.loop import ScalarMonitor
from talik.training.step.step import prepare_top
from talik.training.step.top import World
from talik.training.trunk.cache import BatchGroup
from talik.training.trunk.interfaces import HiddenStates
from talik.training.trunk.trunk import TrunkInput, trunk_pass


@dataclass(frozen=True, slots=True)
class Subject:
    """The recipe and the model of a simulation.

    Attributes:
        recipe: The recipe.
        model: The folder of the model.
        chain: The model without weights.
        tables: The tensors in the model's files, or assumed ones.
    """

    recipe: Recipe
    model: ModelFolder
    chain: Chain
    tables: dict[Path, dict[str, Entry]]


@dataclass(frozen=True, slots=True)
class Workload:
    """The data of a simulation.

    Attributes:
        examples: All examples.
        groups: Batch groups that run through the trunk.
        steps: The examples of each simulated step.
        evaluated: Examples that are evaluated.
        others: How many times the hidden states of `groups` are held for groups that are not simulated.
        pending: Examples of a step whose micro-batches are not computed, but pending while others are.
    """

    examples: Sequence[Example]
    groups: Sequence[BatchGroup]
    steps: Sequence[Sequence[int]]
    evaluated: Sequence[int] = ()
    others: float = 0.0
    pending: Sequence[int] = ()


def subject_of(recipe: Recipe, folder: ModelFolder) -> Subject:
    """The model with everything frozen except what the recipe trains. Weights need not exist."""
    check_layers(recipe, folder.layers)
    model = folder.hollow(working_dtype(recipe))
    there = all(file.is_file() for file in weight_files(folder.path))
    tables = folder.tables if there else assumed_table(model, folder.path)
    FakeWeights(model, folder.path, tables)
    freeze_for(model, recipe)
    return Subject(recipe, folder, Chain(model, "cpu"), tables)


def simulate(subject: Subject, plan: Plan, work: Workload, routing: Routing = "even") -> Simulation:
    """Simulates a plan: two trunk layers of each kind, and everything else completely."""
    chain, device = subject.chain, plan.device.partition(":")[0]
    plan = plan.model_copy(update={"device": "cpu"})  # fake CUDA tensors have no backward
    weights = FakeWeights(chain.model, subject.model.path, subject.tables)
    with fake_world(chain.model, device, routing) as log, log.blocks_of(chain):
        weights.log = log
        try:
            rehearse(subject, weights, plan, work, log, layers=enough_layers(chain, plan.cut))
        finally:
            for block in (REST, EMBEDDINGS, TAIL, *(Block.layer(i) for i in range(plan.layers))):
                weights.remove(block)
            empty_adapters(chain.model)
    return account(log, routed=log.routed)


def rehearse(
    subject: Subject, weights: Weights, plan: Plan, work: Workload, log: Log, *, layers: int
) -> None:
    """Executes all tensor operations of a run in order, with only the first `layers` layers of the trunk.

    Hidden states are not stored; steps read hidden states with undefined values.
    """
    recipe, chain = subject.recipe, subject.chain
    log.phase("load")
    loaded = new_run_model(chain, weights, plan, recipe.seed, ImmediateExecutor())
    log.mark(adapter_weights(chain.model), "weights trained")
    log.phase("trunk")
    with loaded.trunk() as store:
        _load_each(loaded, store, layers)
        if plan.cache != "none":
            _trunk(loaded, store, work, log, layers)
    log.phase("load")
    top = loaded.top()
    weights.changed = FakeCopy(top)
    scratch = MarkedScratch(log, plan.tier)
    prepare_top(top, recipe, loaded.store, scratch)
    form = chain.width_at(plan.cut), chain.dtype_at(plan.cut)
    world = World(loaded.store, scratch, ScalarMonitor(lambda name, _: log.phase(name)))

    def states_of(of: Sequence[Example]) -> HiddenStates | None:
        return None if plan.cache == "none" else FakeStates(lengths_of(of), *form)

    if work.evaluated:
        log.phase("evaluate")
        held_out = [work.examples[i] for i in work.evaluated]
        evaluate_top(top, held_out, states_of(held_out), plan, loaded.store)
    states = states_of(work.examples)
    log.phase("forward")  # a step starts by creating its micro-batches
    for step, indices in enumerate(work.steps, start=1):
        with Pending(top, work.examples, work.pending, states, plan) as scratch.pending:
            run_step(
                top=top,
                examples=work.examples,
                indices=indices,
                states=states,
                world=world,
                recipe=recipe,
                plan=plan,
                step=step,
                learning_rate=1e-5,
            )
    log.phase("save")
    loaded.store.drop_buffers()


def _trunk(loaded: RunModel, store: Store, work: Workload, log: Log, layers: int) -> None:
    """Runs the trunk over the groups of the work."""
    groups = [TrunkInput(group, work.examples) for group in work.groups]
    cache = FakeCache(log, work.others, loaded.plan.hidden_bytes)
    plan = loaded.plan.model_copy(update={"cut": layers})
    trunk_pass(loaded.chain, plan, groups, store, cache, silent)


def _load_each(loaded: RunModel, store: Store, layers: int) -> None:
    """Loads one block after another, like the check of the chain, whose few tokens are ignored."""
    plan = loaded.plan
    store.get(EMBEDDINGS)
    for layer in (*range(layers), *range(plan.cut, plan.layers)):
        with loaded.around(store, layer):
            pass
    if layers < plan.cut:
        store.get(Block.layer(layers))  # it was read ahead
        store.release(Block.layer(layers))
    loaded.store.release(TAIL)


def enough_layers(chain: Chain, cut: int) -> int:
    """The number of trunk layers that contain every kind of layer twice; the others take the same memory."""
    counts: Counter[Any] = Counter()
    kinds = [_kind(chain, index) for index in range(cut)]
    for index, kind in enumerate(kinds):
        if all(counts[each] >= 2 or kinds.count(each) == counts[each] for each in kinds):
            return index
        counts[kind] += 1
    return cut


def _kind(chain: Chain, index: int) -> Any:
    """Layers of one kind run the same operators with the same shapes."""
    layer, whole = chain.layers[index], cast(Any, chain.model.config)
    config = whole.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or [None] * len(chain.layers)
    shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
    return type(layer), types[index] if index < len(types) else None, shapes, chain.width_at(index + 1)
