"""A simulated run compared with the same run on real tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.simulating import SMALL, problem
from talik.kernels.bf16_matmul import bf16_as_fp32
from talik.model.folder import ModelFolder
from talik.model.weights.weights import Weights
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.simulate.account import account
from talik.simulate.simulation import Subject, Workload, rehearse, simulate, subject_of
from talik.simulate.storage_log import CAUSES, StorageLog

AGAIN = {"recompute": True, "trunk": "resident"}
MAMBA = {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 8}
MODELS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen2", {}, {}),
    ("gemma2", {}, AGAIN),
    ("mixtral", {"num_local_experts": 4}, {}),
    ("mixtral", {"num_local_experts": 4}, AGAIN),
    ("mamba2", MAMBA, AGAIN),
    ("qwen2", {}, {"lora": "rank=4"}),
    ("mixtral", {"num_local_experts": 4}, {"lora": "rank=4,dora", **AGAIN}),
    ("gpt2", {}, {"lora": "rank=16,dora,dropout=0.1"}),
]


@pytest.mark.parametrize(("kind", "changes", "way"), MODELS)
def test_every_peak_is_that_of_the_run_on_real_tensors(
    build_model: Callable[..., Any], tmp_path: Path, kind: str, changes: dict[str, Any], way: dict[str, Any]
) -> None:
    build_model(kind, **{**SMALL, **changes}).save_pretrained(tmp_path)
    assert_same_peaks(tmp_path, *problem(tmp_path, "fp32", **way))


@pytest.mark.parametrize("way", [{}, AGAIN])
def test_every_peak_is_that_of_the_run_where_bf16_is_multiplied_as_fp32(
    build_model: Callable[..., Any], tmp_path: Path, way: dict[str, Any]
) -> None:
    """Both experts get all rows, so their products have the slices of the largest group."""
    changes = {"num_hidden_layers": 3, "num_local_experts": 2}
    build_model("mixtral", **SMALL, **changes, dtype=torch.bfloat16).save_pretrained(tmp_path)
    with bf16_as_fp32(True):
        assert_same_peaks(tmp_path, *problem(tmp_path, "bf16", **way))


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("adamw-8bit", "bf16"), ("adafactor", "fp32"), ("muon", "bf16-sr"), ("sgd", "fp32")],
)
def test_every_optimizers_peak_is_that_of_the_run(
    build_model: Callable[..., Any], tmp_path: Path, optimizer: str, precision: str
) -> None:
    """With experts, which Muon updates one after another."""
    changes = {"num_hidden_layers": 2, "num_local_experts": 4}
    build_model("mixtral", **SMALL, **changes, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert_same_peaks(tmp_path, *problem(tmp_path, precision, optimizer))


@pytest.mark.parametrize(
    ("kind", "fields", "plan"),
    [
        ("qwen2", {"tie_word_embeddings": False}, {"thaw": "top.3,norm,head"}),
        ("gemma2", {}, {"thaw": "top.3,norm", "clip": "last", "state": "disk", "inputs": "disk"}),
        ("qwen3", {}, {"thaw": "top.3,norm", "clip": "last"}),
        ("qwen2", {"tie_word_embeddings": True}, {"thaw": "all", "cut": 0, "cache": "none", "state": "disk"}),
        ("llama", {}, {"lora": "rank=4", "thaw": "all", "cut": 0}),
    ],
)
def test_a_streamed_tops_peak_is_that_of_the_run(
    build_model: Callable[..., Any], tmp_path: Path, kind: str, fields: dict[str, Any], plan: dict[str, Any]
) -> None:
    build_model(kind, **{**SMALL, **fields}).save_pretrained(tmp_path)
    of = {name: plan.pop(name) for name in ("thaw", "clip", "lora") if name in plan}
    recipe = Recipe.model_validate({"model": "-", "data": "-", "precision": "bf16", **of})
    _, planned, work = problem(tmp_path, "bf16")
    cut = planned.layers - 3
    ways = {"top": "streamed", "recompute": True, "micro_batch_tokens": 100, "cut": cut, **plan}
    assert_same_peaks(
        tmp_path, subject_of(recipe, ModelFolder(tmp_path)), planned.model_copy(update=ways), work
    )


def assert_same_peaks(folder: Path, subject: Subject, plan: Plan, work: Workload) -> None:
    simulated = {peak.phase: peak.bytes for peak in simulate(subject, plan, work).phases}
    with StorageLog() as log:
        weights = Weights(subject.chain.model, folder)
        rehearse(subject, weights, plan, work, log, layers=plan.cut)
    real = {peak.phase: peak.bytes for peak in account(log).phases}
    assert simulated.keys() == real.keys() >= {"load", "trunk", "forward", "loss", "backward", "update"}
    for phase, size in real.items():
        assert simulated[phase] == pytest.approx(size, rel=0.002, abs=8192), phase


def test_bytes_have_the_right_causes(build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model("qwen2", **SMALL).save_pretrained(tmp_path)
    subject, plan, work = problem(tmp_path, "bf16")
    trained = sum(p.numel() for p in subject.chain.model.parameters() if p.requires_grad)
    result = simulate(subject, plan, work)
    peaks = {peak.phase: peak for peak in result.phases}
    for peak in result.phases:
        assert sum(peak.causes.values()) == peak.bytes
        assert set(peak.causes) <= set(CAUSES)
    backward = peaks["backward"].causes
    assert backward["optimizer state"] == 12 * trained  # fp32 master, mean and square
    assert backward["gradients"] >= 4 * trained
    assert backward["weights trained"] >= 2 * trained
    assert peaks["loss"].causes["logits and loss"] >= 2 * 4 * plan.loss_chunk * 512
    kept = peaks["loss"].causes["saved activations"]
    again = simulate(subject, plan.model_copy(update={"recompute": True}), work)
    assert {p.phase: p for p in again.phases}["loss"].causes["saved activations"] < kept / 2


def test_adapters_take_little_memory_compared_with_frozen_weights(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    build_model("qwen2", **SMALL).save_pretrained(tmp_path)
    subject, plan, work = problem(tmp_path, "bf16", lora="rank=4")
    adapters = [p for p in subject.chain.model.parameters() if p.requires_grad]
    trained = sum(parameter.numel() for parameter in adapters)
    for _ in range(2):  # and afterwards they are hollow again
        assert all(parameter.is_meta for parameter in adapters)
        causes = {peak.phase: peak for peak in simulate(subject, plan, work).phases}["backward"].causes
        assert causes["weights trained"] == 2 * trained
        assert causes["optimizer state"] == 12 * trained
        adapters = [p for p in subject.chain.model.parameters() if p.requires_grad]


def test_a_trained_head_that_was_tied_takes_memory_of_its_own(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    build_model("qwen2", **SMALL, tie_word_embeddings=True).save_pretrained(tmp_path)
    size = SMALL["vocab_size"] * SMALL["hidden_size"] * 4
    trained = []
    for thaw in ("top.2,norm", "top.2,norm,head"):
        recipe = Recipe.model_validate({"model": "-", "data": "-", "thaw": thaw, "precision": "fp32"})
        _, plan, work = problem(tmp_path, "fp32")
        peaks = simulate(subject_of(recipe, ModelFolder(tmp_path)), plan, work).phases
        trained.append(next(peak.causes["weights trained"] for peak in peaks if peak.phase == "forward"))
    assert trained[1] - trained[0] == size


def test_simulation_leaves_the_model_unchanged(build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model("qwen2", **SMALL).save_pretrained(tmp_path)
    subject, plan, work = problem(tmp_path, "fp32")
    one = simulate(subject, plan, work)
    assert all(parameter.is_meta for parameter in subject.chain.model.parameters())
    assert all(type(buffer) is torch.Tensor for buffer in subject.chain.model.buffers())
    assert [p.bytes for p in simulate(subject, plan, work).phases] == [p.bytes for p in one.phases]


def test_the_first_allocation_beyond_a_budget_is_named(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    build_model("qwen2", **SMALL).save_pretrained(tmp_path)
    subject, plan, work = problem(tmp_path, "fp32")
    result = simulate(subject, plan, work)
    assert result.first_break(result.peak.bytes) is None
    broken = result.first_break(result.peak.bytes - 1)
    assert broken is not None
    assert (broken.phase, broken.total) == (result.peak.phase, result.peak.bytes)
