"""Memory of a CUDA device: small logs calculated by hand, and the simulation of a real model."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from talik.data.examples import Example, Span
from talik.data.reading.rows import Place
from talik.machine.machine import Machine, described_machine
from talik.model.folder import ModelFolder
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.simulate.account import Simulation, account
from talik.simulate.cuda.allocator import GRID, MIB
from talik.simulate.cuda.attention import efficient_backward_bytes, flash_backward_bytes
from talik.simulate.cuda.replay import (
    CUDNN,
    EFFICIENT,
    FLASH,
    DeviceAccount,
    context_bytes,
    library_workspace,
    on_cuda,
    target,
)
from talik.simulate.simulation import Workload, simulate, subject_of
from talik.simulate.storage_log import CAUSES, Storage, StorageLog
from talik.training.trunk.cache import groups_of

ADA = described_machine("RTX 4090")
CONTEXT = context_bytes(ADA.processor)
ATTENTION = torch.nn.functional.scaled_dot_product_attention
SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 160,
    "vocab_size": 512,
    "head_dim": 16,
}
SHAPES = [torch.Size(size) for size in ((64, 64), (32, 64), (32, 64), (64, 64), *[(160, 64)] * 3)] * 2
Made = tuple[str, int, tuple[int, ...]]


def log_of(phases: dict[str, list[Made | int]], cause: str = "workspace") -> StorageLog:
    """A log of storages (operator, bytes, shape) by phase; a number is the storage that dies."""
    log = StorageLog()
    log.marks = []
    for phase, events in phases.items():
        log.marks.append((len(log.events), phase))
        for event in events:
            if isinstance(event, int):
                log.events.append(~event)
                continue
            log.events.append(len(log.births))
            log.births.append(Storage(event[1], phase, "layer 3", f"aten::{event[0]}", event[2], cause))
    return log


def taken(phases: dict[str, list[Made | int]], machine: Machine = ADA) -> DeviceAccount:
    return on_cuda(account(log_of(phases)), machine)


def made(mib: float, operator: str = "empty") -> Made:
    return operator, int(mib * MIB), (int(mib * MIB),)


def test_a_phase_holds_whole_pages_and_the_context() -> None:
    result = taken({"load": [made(15), made(15), 0], "forward": [made(4)]})
    load, forward = result.phases
    assert (load.phase, load.block, load.operator) == ("load", "layer 3", "aten::empty")
    assert load.causes == {"workspace": 30 * MIB, "allocator": 18 * MIB, "libraries": CONTEXT}
    assert forward.causes == {"workspace": 19 * MIB, "allocator": 21 * MIB, "libraries": CONTEXT}
    assert (forward.phase, forward.bytes) == ("forward", 40 * MIB + CONTEXT)  # 4 MiB fit in no half page
    assert result.peak is load
    assert load.bytes == result.capacity == 48 * MIB + CONTEXT  # two pages of 20, to the next 16


def test_a_budget_is_exceeded_in_whole_pages() -> None:
    """A hole of 30 MiB between two storages is too small for 31 MiB, which need three more pages."""
    result = taken({"load": [made(30), made(30), made(20), 1], "forward": [made(31)]})
    assert result.capacity - CONTEXT == 112 * MIB
    assert result.first_break(result.capacity) is None
    broken = result.first_break(CONTEXT + 99 * MIB)
    assert broken is not None
    assert (broken.phase, broken.block, broken.operator) == ("forward", "layer 3", "aten::empty")
    assert (broken.bytes, broken.shape) == (31 * MIB, (31 * MIB,))
    assert broken.total > CONTEXT + 99 * MIB > CONTEXT + (30 + 20 + 31) * MIB  # by bytes alone it would fit
    assert result.first_break(0) is not None


def test_measured_context_replaces_the_estimate() -> None:
    result = on_cuda(account(log_of({"load": [made(15)]})), ADA, context=100 * MIB)
    assert result.capacity == (100 + 32) * MIB
    assert context_bytes("NVIDIA GeForce RTX 3090") < context_bytes(None) < 1024 * MIB


def test_each_thread_that_multiplies_has_a_workspace() -> None:
    assert library_workspace((8, 6)) == 8_519_680
    assert library_workspace((9, 0)) == library_workspace(None) == 32 * MIB
    forward: list[Made | int] = [made(4, "mm"), 0, made(4, "mm"), 1]
    phases = {"load": [made(2)], "forward": [made(4, "mm"), 1, made(4, "mm"), 2], "backward": [made(4, "mm")]}
    workspace = library_workspace(ADA.compute_capability)
    libraries = [phase.causes["libraries"] - CONTEXT for phase in taken(phases).phases]
    assert libraries == [0, workspace, 2 * workspace]
    assert taken({"forward": forward}).phases[0].causes["libraries"] == CONTEXT + workspace


@pytest.mark.parametrize("operator", [FLASH, CUDNN, EFFICIENT])
def test_attention_s_backward_takes_more_than_its_results(operator: str) -> None:
    name, query, key = operator.removeprefix("aten::"), (1, 28, 1024, 128), (1, 4, 1024, 128)
    if operator == EFFICIENT:
        key = query
        hidden = efficient_backward_bytes(1, 28, 1024, 1024, 128, 2, (8, 9))
    else:
        hidden = flash_backward_bytes(1, 28, 1024, 128, 4)
    of_query, of_key = 2 * 28 * 1024 * 128, 2 * key[1] * 1024 * 128
    call: list[Made | int] = [(name, of_query, query), (name, of_key, key), (name, of_key, key)]
    result = taken({"backward": [*call, 0, 1, 2, *call, 3, 4, 5], "update": [made(1)]})
    backward, update = result.phases
    assert backward.causes["libraries"] == CONTEXT + hidden
    assert backward.causes["workspace"] == of_query + 2 * of_key
    assert backward.operator == operator
    assert update.causes["libraries"] == CONTEXT  # freed with the call
    broken = result.first_break(result.capacity - GRID)
    assert broken is not None
    assert (broken.operator, broken.bytes) == (operator, hidden)


def test_a_log_without_storages_takes_the_context() -> None:
    result = taken({"load": []})
    assert (result.capacity, result.phases) == (CONTEXT, ())


@pytest.fixture(scope="module")
def simulated(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bf16 step of a small Qwen2 with padded examples, simulated for a CPU or for a machine."""
    folder = tmp_path_factory.mktemp("model")
    build_model("qwen2", **SMALL).config.save_pretrained(folder)
    recipe = Recipe.model_validate({"model": "-", "data": "-", "top_layers": 2, "precision": "bf16"})
    subject = subject_of(recipe, ModelFolder(folder))
    plan = Plan.model_validate(
        {"device": "cpu", "threads": 1, "cut": 1, "layers": 3, "trunk": "streamed", "top": "resident",
         "cache": "disk", "trunk_batch_tokens": 256, "hidden_bytes": 1 << 30, "micro_batch_tokens": 512,
         "loss_chunk": 256, "recompute": False}
    )  # fmt: skip
    examples = [_example(length) for length in (96, 60)]
    work = Workload(examples, groups_of(examples, 256), [[0, 1]])

    def run(machine: Machine | None, **way: Any) -> Simulation:
        if machine is None:
            return simulate(subject, plan, work)
        with target(machine):
            return simulate(subject, plan.model_copy(update={"device": machine.device, **way}), work)

    return run


def _example(length: int) -> Example:
    spans = (Span(0, length // 2, False), Span(length // 2, length, True))
    return Example(array("i", range(3, 3 + length)), spans, Place("made.jsonl", 1))


def test_a_simulation_runs_the_kernels_of_its_target(simulated: Any) -> None:
    cpu, ada, turing = (simulated(machine) for machine in (None, ADA, described_machine("T4")))
    assert not _kernels(ada) & _kernels(cpu)
    assert {FLASH, EFFICIENT} & _kernels(ada) == {
        FLASH
    }  # flash attention takes no mask, and this model passes none
    assert _kernels(turing) == {"aten::_scaled_dot_product_attention_math"}  # and nothing fused bf16
    scores = 2 * 2 * 4 * 96 * 96  # bytes: batch, heads, queries, keys
    assert abs(_saved(ada) - _saved(cpu)) < scores
    assert _saved(turing) - _saved(cpu) >= 2 * scores  # of two layers
    result = on_cuda(ada, ADA)
    own = [size for key, size in result.demand.events if key >= len(ada.log.births) and size > 0]
    workspace = library_workspace(ADA.compute_capability)
    assert own == [workspace, workspace, *[flash_backward_bytes(2, 4, 96, 16, 2)] * 2]
    assert [peak.phase for peak in result.phases] == [peak.phase for peak in ada.phases]
    for device, fake in zip(result.phases, ada.phases, strict=True):
        assert device.bytes == sum(device.causes.values()) >= fake.bytes + CONTEXT
        assert set(device.causes) <= {*CAUSES, "libraries", "allocator"}
    assert result.first_break(result.capacity) is None
    assert result.first_break(result.capacity - GRID) is not None


@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize("top", ["resident", "streamed"])
def test_offloaded_state_takes_only_the_copied_slices_on_the_device(
    simulated: Any, top: str, tier: str
) -> None:
    """A tensor that is not copied to the device would fail here, because it is on meta."""
    way = {"top": top, "recompute": True}
    near, offloaded = simulated(ADA, **way), simulated(ADA, **way, state=tier, inputs=tier)
    updates = [next(p for p in of.phases if p.phase == "update").causes for of in (near, offloaded)]
    state = 3 * 4 * sum(shape.numel() for shape in SHAPES)
    assert updates[0]["optimizer state"] >= state and "optimizer state" not in updates[1]
    copied = 3 * 4 * max(shape.numel() for shape in SHAPES)
    assert updates[1]["workspace"] >= copied > updates[0]["workspace"]
    assert on_cuda(offloaded, ADA).peak.bytes <= on_cuda(near, ADA).peak.bytes


def test_on_a_cpu_the_target_changes_nothing() -> None:
    here = replace(ADA, device="cpu", compute_capability=None)
    with target(here):
        assert torch.nn.functional.scaled_dot_product_attention is ATTENTION
    with target(replace(ADA, device="cuda:1")):
        assert torch.nn.functional.scaled_dot_product_attention is not ATTENTION
    assert torch.nn.functional.scaled_dot_product_attention is ATTENTION


def _kernels(simulation: Simulation) -> set[str]:
    return {made.operator for made in simulation.log.births if "attention" in made.operator}


def _saved(simulation: Simulation) -> int:
    peaks = {peak.phase: peak for peak in simulation.phases}
    return peaks["loss"].causes["saved activations"]
