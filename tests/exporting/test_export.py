"""Exports of every kind of source load with plain Transformers and have the tuned model's logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import talik
from talik.base.errors import UsageError
from talik.base.events import Status
from talik.base.files import read_json
from talik.chat import Talk, load_for_chat
from talik.model.folder import ModelFolder
from talik.plan.ways import choose
from talik.recipe.recipe import Recipe

MAMBA2 = {"num_heads": 8, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 16}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3_text", {}, "bf16"),
    ("gpt2", {}, "fp32"),
    ("mixtral", {"num_local_experts": 4}, "fp32"),
    ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}, "bf16"),
    ("mamba2", MAMBA2, "bf16"),
    ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64}, "bf16-sr"),
]


def trained(folder: Path, rows: Path, run: Path, **changes: Any) -> Path:
    fields = {"model": str(folder), "data": str(rows), "top_layers": 2, "steps": 2, "batch_tokens": 300}
    recipe = Recipe.model_validate({**fields, "learning_rate": 1e-3, **changes})
    talik.train(recipe, run, plan=choose(recipe, ModelFolder(folder)) if folder.is_dir() else None)
    return run


def exported(run: Path, out: Path) -> list[str]:
    """Exports, and returns what was said about the logits."""
    said: list[Any] = []
    talik.export(run, out, notify=said.append)
    return [event.text for event in said if isinstance(event, Status) and "logits" in event.text]


@pytest.mark.parametrize(("family", "changes", "precision"), CASES)
def test_families(
    build_model: Callable[..., Any],
    tokenizer: Any,
    rows: Path,
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    precision: str,
) -> None:
    """In shards and in a dtype that is not the run's for some; merged experts go back to their own names."""
    model = build_model(family, eos_token_id=2, **changes)
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "source")
    assert (tmp_path / "source" / "model.safetensors.index.json").is_file()
    run = trained(tmp_path / "source", rows, tmp_path / "run", precision=precision)
    assert "logits equal to the tuned model's" in exported(run, tmp_path / "out")[0]
    index = "model.safetensors.index.json"
    maps = [read_json(tmp_path / name / index)["weight_map"] for name in ("source", "out")]
    assert maps[0] == maps[1]


def test_a_checkpoint_of_the_bare_model(
    build_model: Callable[..., Any], tokenizer: Any, rows: Path, tmp_path: Path
) -> None:
    """GPT-2's own files have no "transformer." before their names."""
    build_model("gpt2", eos_token_id=2).transformer.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    run = trained(tmp_path / "source", rows, tmp_path / "run", precision="fp32")
    assert "logits equal" in exported(run, tmp_path / "out")[0]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "h.3.ln_1.weight" in file.keys()  # noqa: SIM118


def test_an_untied_head_and_a_tokenizer_without_a_template(
    build_model: Callable[..., Any], tokenizer: Any, rows: Path, tmp_path: Path
) -> None:
    build_model("qwen2", tie_word_embeddings=True, eos_token_id=0).save_pretrained(tmp_path / "source")
    bare = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    bare.save_pretrained(tmp_path / "source")
    run = trained(
        tmp_path / "source", rows, tmp_path / "run", precision="fp32", top_layers=5, thaw="top.2,norm,head"
    )
    assert "logits equal" in exported(run, tmp_path / "out")[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert "Assistant:" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    # The end that training taught ends an answer, too, beside the one that the model had.
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [0, 2]
    loaded, own = load_for_chat(tmp_path / "out")
    assert "".join(Talk(loaded, own, max_tokens=4).ask("?")) is not None


def test_weights_that_lack_a_tensor_are_refused(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    """Transformers fills what is missing with random numbers."""
    import shutil

    from safetensors.torch import load_file, save_file

    from talik.base.errors import SourceError

    shutil.copytree(model_folder, tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lack 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        trained(tmp_path / "source", rows, tmp_path / "run")


ADAPTED: list[tuple[str, dict[str, Any], str, str]] = [
    ("qwen2", {"tie_word_embeddings": True}, "rank=4", "fp32"),
    ("gpt2", {}, "rank=4,dora", "fp32"),
    ("mixtral", {"num_local_experts": 4}, "rank=4", "fp32"),
    ("llama", {}, "rank=4,targets=q_proj+v_proj,dora", "bf16"),
]


@pytest.mark.parametrize(("family", "changes", "lora", "precision"), ADAPTED)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_adapters_merged_and_by_themselves(
    build_model: Callable[..., Any],
    tokenizer: Any,
    rows: Path,
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    lora: str,
    precision: str,
) -> None:
    """The folder of PEFT has the tuned model's logits; the merged one those of PEFT's merge_and_unload."""
    model = build_model(family, eos_token_id=2, **changes)
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "source")
    run = trained(
        tmp_path / "source", rows, tmp_path / "run", precision=precision, lora=lora, learning_rate=1e-2
    )
    assert "logits equal to the tuned model's with its adapters merged" in exported(run, tmp_path / "out")[0]
    said: list[Any] = []
    talik.export(run, tmp_path / "adapter", adapter=True, notify=said.append)
    assert "loaded by PEFT" in said[-1].text and "logits equal to the tuned model's" in said[-1].text
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype)
    ids = torch.arange(3, 30)[None]
    plain = base(input_ids=ids).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    apart = theirs(input_ids=ids).logits
    whole = load_for_chat(run)[0]
    assert torch.equal(whole(input_ids=ids).logits, apart) and not torch.equal(apart, plain)
    merged = theirs.merge_and_unload()(input_ids=ids).logits
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(ours(input_ids=ids).logits, merged)
    assert ours.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_a_run_without_adapters_has_none_to_export(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trained no adapters"):
        talik.export(run_folder, tmp_path / "out", adapter=True)


@pytest.mark.parametrize("names", [("lm_head.weight",), ("lm_head.weight", "model.embed_tokens.weight")])
def test_a_tied_matrix_under_each_name_that_the_file_has(
    names: tuple[str, ...], build_model: Callable[..., Any], tokenizer: Any, rows: Path, tmp_path: Path
) -> None:
    """Transformers would load two that differ as two."""
    build_model("qwen2", tie_word_embeddings=True, eos_token_id=2).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    weights = load_file(file)
    table = weights.pop("model.embed_tokens.weight")
    save_file({**weights, **{name: table.clone() for name in names}}, file, {"format": "pt"})
    changes = {"top_layers": 5, "thaw": "all", "precision": "fp32"}
    run = trained(tmp_path / "source", rows, tmp_path / "run", **changes)
    assert "logits equal" in exported(run, tmp_path / "out")[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, table)
