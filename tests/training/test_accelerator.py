"""The same results on an accelerator as on a CPU; skipped without an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import talik
from helpers.training import assert_same, make_recipe, trained
from talik.model.folder import ModelFolder
from talik.plan.target import slack_of
from talik.plan.ways import choose
from talik.recipe.recipe import Recipe

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")


@pytest.fixture(scope="module")
def device() -> str:
    return str(torch.accelerator.current_accelerator())


STREAMED = {"top": "streamed", "recompute": True}
IN_RAM, ON_DISK = ({"state": tier, "inputs": tier} for tier in ("ram", "disk"))


@pytest.mark.parametrize("way", [{"state": "ram"}, STREAMED, {**STREAMED, **IN_RAM}, {**STREAMED, **ON_DISK}])
@pytest.mark.parametrize("precision", ["bf16", "bf16-sr", "fp32"])
def test_offloading_does_not_change_the_numbers(
    build_model: Callable[..., Any], tmp_path: Path, device: str, precision: str, way: dict[str, Any]
) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = build_model("qwen2", dtype=dtype, tie_word_embeddings=False)
    recipe = make_recipe(precision=precision, thaw="top.3,norm,head")
    expected = trained(model, tmp_path / "one", recipe, steps=3, device=device)
    found = trained(model, tmp_path / "two", recipe, steps=3, device=device, **way)
    assert all(weight.device.type == torch.device(device).type for weight in found[0].values())
    assert_same(found, expected)


@pytest.mark.whole_run
def test_losses_are_about_those_of_the_cpu(
    model_folder: Path, rows: Path, tmp_path: Path, device: str
) -> None:
    losses = []
    for number, where in enumerate(("cpu", device)):
        fields = {"model": str(model_folder), "data": str(rows), "precision": "fp32", "top_layers": 2}
        recipe = Recipe.model_validate(
            {**fields, "batch_tokens": 200, "steps": 10, "held_out": 0.2, "device": where}
        )
        result = talik.train(recipe, tmp_path / str(number), plan=choose(recipe, ModelFolder(model_folder)))
        assert result.base is not None and result.tuned is not None
        losses.append((result.base.loss, result.tuned.loss))
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.whole_run
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a CPU and CUDA can be planned for")
def test_a_run_on_cuda_keeps_its_promise(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    fields = {"model": str(model_folder), "data": str(rows), "top_layers": 2, "steps": 3}
    result = talik.train(Recipe.model_validate({**fields, "device": "cuda"}), tmp_path / "run")
    promised = max(row.get("promised", 0) for row in result.memory.values())
    assert 0 < max(row["measured"] for row in result.memory.values()) <= promised + slack_of(promised)
