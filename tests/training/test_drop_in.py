"""A model whose forward computes Talik's loss: in the documented Trainer, and in single calls."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import talik
from talik.base.errors import UsageError
from talik.model.freeze import freeze

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
CHUNK = 5


def documented(begins: str) -> str:
    """The code block of docs/python.md that contains a text."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if begins in block)


def run_trainer(code: str, names: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Runs the documented Trainer with its own output folder."""
    own = {**names, "runs": runs}
    exec(compile(code, str(PAGE), "exec"), own)
    return own


@pytest.fixture
def names(model_folder: Path, rows: Path) -> dict[str, Any]:
    """The names that the page defines before the Trainer."""
    own: dict[str, Any] = {"folder": str(model_folder), "rows": str(rows), "talik": talik, "torch": torch}
    exec(compile(documented("talik.read_data"), str(PAGE), "exec"), own)
    return {**own, "AutoModelForCausalLM": AutoModelForCausalLM}


def steps_of(trainer: Any) -> list[list[float]]:
    return [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history if "grad_norm" in line]


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_documented_trainer_equals_one_on_the_plain_model(
    names: dict[str, Any], tmp_path: Path, accumulated: int
) -> None:
    code = documented("Trainer(").replace(
        "use_cpu=True", f"use_cpu=True, gradient_accumulation_steps={accumulated}"
    )
    ours = run_trainer(code, names, tmp_path / "ours")
    plain = run_trainer(code.replace("talik.drop_in(model)\n", ""), names, tmp_path / "plain")
    steps, expected = steps_of(ours["trainer"]), steps_of(plain["trainer"])
    assert len(steps) >= 6 and steps[-1][0] < steps[0][0]
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    folder = tmp_path / "ours" / "trained"
    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    loaded, report = found
    assert not any(report.values())
    for name, weight in plain["model"].named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["bf16=True", "activation_checkpointing=True"])
def test_the_trainers_ways_to_save_memory(names: dict[str, Any], tmp_path: Path, option: str) -> None:
    code = documented("Trainer(").replace("use_cpu=True", f"use_cpu=True, {option}, max_steps=4")
    ours = run_trainer(code, names, tmp_path / "ours")
    assert not torch.is_autocast_enabled("cpu")
    plain = run_trainer(code.replace("talik.drop_in(model)\n", ""), names, tmp_path / "plain")
    near = 2e-2 if "bf16" in option else 1e-5
    torch.testing.assert_close(
        torch.tensor(steps_of(ours["trainer"])),
        torch.tensor(steps_of(plain["trainer"])),
        rtol=near,
        atol=near,
    )


def padded_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 380, (3, 14), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 9:], mask[2, :4] = 0, 0
    labels[:, :6], labels[1, 9:] = -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_loss_and_gradients_equal_the_plain_models(build_model: Callable[..., Any], family: str) -> None:
    plain, ours = build_model(family), build_model(family)
    freeze(plain, "top.2,norm")
    trained = freeze(ours, "top.2,norm")
    talik.drop_in(ours, CHUNK)
    expected, found = plain(**padded_batch()).loss, ours(**padded_batch()).loss
    (expected * 2).backward()
    (found * 2).backward()
    torch.testing.assert_close(found, expected)
    for name in trained:
        torch.testing.assert_close(ours.get_parameter(name).grad, plain.get_parameter(name).grad)


def test_no_graph_below_the_cut_and_never_all_logits(build_model: Callable[..., Any]) -> None:
    """Also if gradient checkpointing has put the embeddings into the graph."""
    model = build_model("qwen2")
    freeze(model, "top.2,norm")
    model.enable_input_require_grads()
    talik.drop_in(model, CHUNK)
    modes, rows = [], []
    for (
        layer
    ) in model.model.layers:  # its parts run where the layer itself does, not where something stands in
        layer.mlp.register_forward_hook(lambda _, given, out: modes.append(out.requires_grad))
    model.lm_head.register_forward_hook(lambda _, given, out: rows.append(out.shape[:-1].numel()))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(len(modes)) or tensor, lambda t: t
    ):
        output = model(**padded_batch())
    assert modes == [False, False, True, True]
    assert saved and min(saved) >= 2, "a layer of the trunk kept something for the backward"
    assert output.logits is None
    batch = padded_batch()
    trained = int((batch["labels"][:, 1:] != -100).sum())
    assert sum(rows) == trained and max(rows) <= CHUNK


def test_without_labels_the_model_is_itself_and_a_copy_has_its_own_weights(
    build_model: Callable[..., Any],
) -> None:
    model, plain = build_model("qwen2"), build_model("qwen2")
    freeze(model, "top.2,norm")
    talik.drop_in(model)
    batch = padded_batch()
    labels = batch.pop("labels")
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=0, atol=0)
    ids = batch["input_ids"][:1]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    copied = copy.deepcopy(model)
    before = model(**batch, labels=labels).loss
    with torch.no_grad():
        copied.model.layers[3].mlp.down_proj.weight.zero_()
        assert model(**batch, labels=labels).loss == before != copied(**batch, labels=labels).loss


def test_what_is_refused(build_model: Callable[..., Any]) -> None:
    model = build_model("qwen2")
    talik.drop_in(model)
    batch = padded_batch()
    with pytest.raises(UsageError, match="embeddings require a gradient"):
        model(**batch)
    freeze(model, "top.2,norm")
    with pytest.raises(UsageError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(3, 14, 32), labels=batch["labels"])
    with pytest.raises(UsageError, match="position_ids"):
        model(**batch, position_ids=batch["input_ids"], use_cache=False)
    with pytest.raises(UsageError, match="by name"):
        model(batch["input_ids"], labels=batch["labels"])
    with pytest.raises(UsageError, match="replaced before"):
        talik.drop_in(model)
