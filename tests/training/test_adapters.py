"""Adapters: the same losses, weights and gradients as with PEFT in a plain PyTorch loop."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import talik
from helpers.training import gradients, plain_gradients, plain_loss
from talik.base.errors import RecipeError, UsageError
from talik.base.events import StepDone
from talik.data.batches import steps_of_epoch
from talik.data.dataset import read_sets
from talik.data.examples import Example
from talik.model.adapters import adapted, fill_adapters, idle_adapters, in_words, measure_lengths
from talik.model.chain.chain import Chain
from talik.model.folder import ModelFolder
from talik.model.freeze import freeze_for
from talik.model.tokenizer import load_tokenizer
from talik.plan.ways import check_plan, choose
from talik.recipe.lora import Lora, parse_lora
from talik.recipe.recipe import Recipe, checked_recipe
from talik.training.loading import load_whole_model, open_run_model
from talik.training.run.checkpoints import latest_checkpoint
from talik.training.run.schedule import learning_rate_at
from talik.training.step.top import Top, make_top

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
MOE = {"num_local_experts": 4}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"tie_word_embeddings": True}, "rank=4"),
    ("llama", {}, "rank=4,targets=q_proj+v_proj"),
    ("gpt2", {}, "rank=4,alpha=3"),
    ("mixtral", MOE, "rank=4"),
    ("qwen2", {}, "rank=4,dora"),
    ("gpt2", {}, "rank=4,dora"),
]


def recipe_for(folder: Path, rows: Path | str = "-", **changes: Any) -> Recipe:
    fields = {"model": str(folder), "data": str(rows), "precision": "fp32", "batch_tokens": 200}
    return checked_recipe({**fields, "top_layers": 2, "lora": "rank=4", "learning_rate": 3e-3, **changes})


def train(recipe: Recipe, run: Path, **options: Any) -> Any:
    return talik.train(recipe, run, plan=choose(recipe, ModelFolder(Path(recipe.model))), **options)


def adapted_top(model: Any, lora: str, seed: int = 0) -> Top:
    """Adapters on the last two layers, with B not zero, so that no gradient is zero."""
    freeze_for(model, Recipe(model="-", data="-", top_layers=2, lora=lora))
    fill_adapters(model, seed, torch.device("cpu"))
    measure_lengths(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(seed)
    for name, parameter in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return make_top(Chain(model), trained)


@pytest.mark.parametrize(("family", "changes", "lora"), CASES)
def test_gradients_are_those_of_the_plain_model_with_adapters(
    build_model: Callable[..., Any], examples: list[Example], family: str, changes: dict[str, Any], lora: str
) -> None:
    """The error against float64 is at most twice that of plain fp32."""
    model = build_model(family, **changes)
    model.config._experts_implementation = "eager"  # the only one that knows float64
    top = adapted_top(model, lora)
    exact_loss, exact = plain_gradients(copy.deepcopy(model).double(), examples)
    plain_value, plain = plain_gradients(model, examples)
    model.zero_grad()
    loss, ours = gradients(top, examples, [[0, 3], [1, 2], [4], [5]])
    assert ours.keys() == plain.keys() == exact.keys() and all("lora_" in name for name in ours)
    assert abs(loss - exact_loss) <= max(2 * abs(plain_value - exact_loss), 2**-23 * exact_loss)
    for name in exact:
        floor = 2**-23 * exact[name].norm()
        error, allowed = (ours[name] - exact[name]).norm(), 2 * (plain[name] - exact[name]).norm()
        assert error <= allowed + floor and exact[name].norm() > 0, name


@pytest.mark.parametrize(("family", "changes", "lora"), CASES[:1] + CASES[2:])
def test_a_loaded_run_begins_as_peft_begins(
    build_model: Callable[..., Any], tmp_path: Path, family: str, changes: dict[str, Any], lora: str
) -> None:
    """Loaded by block and as a whole: the same adapters and model weights, and the magnitudes of PEFT."""
    build_model(family, **changes).save_pretrained(tmp_path)
    recipe = recipe_for(tmp_path, lora=lora)
    plan = choose(recipe, ModelFolder(tmp_path))
    loaded = open_run_model(recipe, plan, ModelFolder(tmp_path))
    top = dict(loaded.top().parameters())
    model, whole = load_whole_model(recipe, plan, ModelFolder(tmp_path))
    assert [(n, p.shape) for n, p in top.items()] == [(n, p.shape) for n, p in whole.parameters()]
    assert all(torch.equal(top[name], parameter) for name, parameter in whole.parameters())
    assert not any(p.is_meta for layer in loaded.chain.layers[2:] for p in layer.parameters())
    theirs = peft_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), lora, [2, 3])
    assert set(adapted(theirs.base_model.model)) == set(adapted(model))
    for name, parameter in theirs.base_model.model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            assert torch.equal(top[name], parameter), name
    ids = torch.arange(3, 20)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    difference = (model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max()
    assert difference == 0 or ("dora" in lora and difference < 1e-5)


def peft_model(model: Any, line: str, layers: list[int]) -> Any:
    """The model as PEFT builds it."""
    lora: Lora = parse_lora(line)
    conv = model.config.model_type == "gpt2"
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=lora.dropout,
            use_dora=lora.dora,
            target_modules=list(lora.targets)
            or (["c_attn", "c_proj", "c_fc"] if conv else r".*(q|k|v|o|gate|up|down)_proj"),
            layers_to_transform=layers if lora.targets or conv else None,
            exclude_modules=None if lora.targets or conv else r".*layers\.[01]\..*",
            fan_in_fan_out=conv,
        ),
    )


def peft_loop(recipe: Recipe, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain training loop over PEFT's model, beginning with the adapters of the run."""
    folder = Path(recipe.model)
    assert recipe.lora is not None
    model = peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), recipe.lora, [2, 3]
    ).eval()
    plan = choose(recipe, ModelFolder(folder))
    _, top = load_whole_model(recipe, plan, ModelFolder(folder))
    inner = dict(model.base_model.model.named_parameters())
    trained = {name: parameter for name, parameter in inner.items() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in top.parameters():
            trained[name].copy_(parameter)
    assert len(trained) == len(dict(top.parameters()))
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon)
    examples = read_sets(recipe, load_tokenizer(folder))[0].examples
    losses: list[float] = []
    lengths = [e.length for e in examples]
    for epoch in range(steps):
        for indices in steps_of_epoch(lengths, recipe.batch_tokens, recipe.seed, epoch):
            if len(losses) == steps:
                return losses, {name: p.detach() for name, p in trained.items()}
            batch = [examples[i] for i in indices]
            loss = plain_loss(model, batch, sum(e.trained_tokens for e in batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(trained.values()), recipe.max_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(recipe, len(losses) + 1, steps)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    raise AssertionError("unreachable")


@pytest.mark.whole_run
@pytest.mark.parametrize("lora", ["rank=4", "rank=8,alpha=8,targets=q_proj+v_proj,dora"])
def test_twenty_steps_equal_peft_in_a_plain_loop(
    model_folder: Path, rows: Path, tmp_path: Path, lora: str
) -> None:
    recipe = recipe_for(model_folder, rows, steps=20, lora=lora, learning_rate=1e-2)
    train(recipe, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    expected, weights = peft_loop(recipe, 20)
    assert losses[-1] < 0.95 * losses[0]
    assert losses == pytest.approx(expected, abs=1e-5)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    ours = load_file(checkpoint / "weights.safetensors")
    assert ours.keys() == weights.keys()
    for name, weight in weights.items():
        assert (ours[name] - weight).norm() < 1e-3 * weight.norm(), name


@pytest.mark.whole_run
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_run_goes_on_bit_for_bit(
    model_folder: Path, rows: Path, tmp_path: Path, precision: str
) -> None:
    """With dropout and DoRA, whose magnitudes are read from the checkpoint and not computed again."""
    changes = {"lora": "rank=4,dora,dropout=0.2", "steps": 6, "save_every": 2, "precision": precision}
    recipe = recipe_for(model_folder, rows, **changes)
    train(recipe, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "part", notify=kill)
    talik.resume(tmp_path / "part")
    for name in ("weights", "optimizer"):
        one, other = (
            load_file(tmp_path / run / "checkpoints" / "step-00000006" / f"{name}.safetensors")
            for run in ("whole", "part")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
        assert all("lora_" in key for key in one)
    log = (tmp_path / "part" / "log.txt").read_text(encoding="utf-8")
    assert "layers 2 to 3: rank=4,dora,dropout=0.2, adapters on self_attn.q_proj," in log


def test_dropout_is_on_in_training_alone(build_model: Callable[..., Any], examples: list[Example]) -> None:
    top = adapted_top(build_model("qwen2"), "rank=4,dropout=0.5")
    ids = torch.tensor([list(examples[0].input_ids)])

    def logits() -> torch.Tensor:
        return top.chain.model(input_ids=ids).logits

    assert torch.equal(logits(), logits())
    top.train_mode(True)
    assert not torch.equal(logits(), logits())
    top.train_mode(False)
    assert torch.equal(logits(), logits())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora": "rank=four"}, "'rank=four' is not of the form rank=16,alpha=32,targets=all"),
        (
            {"lora": "rank=4", "thaw": "top.2,head", "top_layers": 5},
            "lora puts adapters on layers.*combined with head",
        ),
    ],
)
def test_a_recipe_that_asks_for_what_is_not_there(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_for(Path("-"), **fields)


@pytest.mark.parametrize(
    ("family", "changes", "lora", "words"),
    [
        ("qwen2", {}, "targets=qkv_proj", r"no linear layer qkv_proj(.|\n)*down_proj, gate_proj, k_proj"),
        ("mamba2", {"num_heads": 8, "expand": 2, "state_size": 8, "n_groups": 1}, "rank=4", "out_proj"),
        ("mixtral", MOE, "targets=w1", "no linear layer w1(.|\n)*There are k_proj, o_proj, q_proj, v_proj"),
    ],
)
def test_what_cannot_have_adapters_is_refused(
    build_model: Callable[..., Any], family: str, changes: dict[str, Any], lora: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        freeze_for(build_model(family, **changes), Recipe(model="-", data="-", top_layers=2, lora=lora))


@pytest.mark.whole_run
def test_adapters_that_no_gradient_reaches_are_named(
    build_model: Callable[..., Any], model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    top = adapted_top(build_model("qwen2"), "rank=4")
    assert idle_adapters(top.chain.model) == []
    for layer in top.chain.layers[2:]:
        torch.nn.init.zeros_(layer.get_submodule("mlp.up_proj.lora_B.default").weight)  # pyright: ignore
    assert idle_adapters(top.chain.model) == ["mlp.up_proj"]
    said: list[Any] = []
    train(recipe_for(model_folder, rows, steps=1), tmp_path / "run", notify=said.append)
    assert not [event for event in said if "no gradient" in str(event)]
    with pytest.MonkeyPatch.context() as patch:  # a layer whose weight is used without calling it
        patch.setattr(
            Qwen2MLP, "forward", lambda self, x: F.linear(F.silu(self.gate_proj(x)), self.down_proj.weight)
        )
        train(recipe_for(model_folder, rows, steps=1), tmp_path / "other", notify=said.append)
    notes = [event.text for event in said if "no gradient" in str(event)]
    assert notes == ["no gradient reached the adapters on mlp.up_proj, mlp.down_proj in the first step"]


def test_experts_without_adapters_are_named(build_model: Callable[..., Any]) -> None:
    model = build_model("mixtral", **MOE)
    freeze_for(model, Recipe(model="-", data="-", thaw="all", lora="rank=4"))
    text = in_words(model)
    assert text.startswith("adapters on self_attn.q_proj,")
    assert "; mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj there have none" in text
    layers = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert layers == {"0", "1", "2", "3"}


def test_without_peft_the_extra_is_named(
    build_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"adapters need PEFT(.|\n)*pip install \"talik\[peft\]\""):
        freeze_for(build_model("qwen2"), Recipe(model="-", data="-", lora="rank=4", top_layers=2))


@pytest.mark.whole_run
def test_a_lowest_layer_without_adapters(
    build_model: Callable[..., Any], tokenizer: Any, rows: Path, tmp_path: Path
) -> None:
    """No gradient reaches that layer, streamed or not."""
    types = ["conv", "full_attention", "conv", "full_attention"]
    build_model("lfm2", layer_types=types, eos_token_id=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = recipe_for(
        tmp_path / "model", rows, thaw="layers.0-3", lora="rank=4,targets=q_proj", steps=2, top_layers=5
    )
    weights = []
    for top in ("resident", "streamed"):
        plan = choose(recipe, ModelFolder(tmp_path / "model")).model_copy(
            update={"top": top, "recompute": True}
        )
        talik.train(recipe, tmp_path / top, plan=plan)
        checkpoint = latest_checkpoint(tmp_path / top)
        assert checkpoint is not None
        weights.append(load_file(checkpoint / "weights.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert any(tensor.any() for name, tensor in weights[1].items() if "lora_B" in name)


def test_a_plan_for_frozen_embeddings_is_not_one_for_trained_ones(model_folder: Path) -> None:
    """With it the trunk's hidden states would come from the cache although the embeddings change."""
    fields = {"model": str(model_folder), "data": "-"}
    plan = choose(checked_recipe({**fields, "thaw": "layers.0-3"}), ModelFolder(model_folder))
    with pytest.raises(UsageError, match="embeddings are not trained"):
        check_plan(plan, checked_recipe({**fields, "thaw": "all"}), ModelFolder(model_folder))
