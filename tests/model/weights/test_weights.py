"""Weights read from files are those that Transformers loads: names, merges, dtypes, ties and buffers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.loading_check import loaded_differently
from talik.base.errors import SourceError
from talik.model.block import Block
from talik.model.weights.digests import tensor_digests, weights_fingerprint
from talik.model.weights.hollow import hollow_model
from talik.model.weights.weights import Weights

CASES = {
    "plain": ("qwen2", {"tie_word_embeddings": False}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "merged experts": ("mixtral", {"num_local_experts": 4}),
    "merged and fused experts": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16}),
    "transposed": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64}),
    "buffers that are saved": (
        "deepseek_v3",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8}
        | {"q_lora_rank": 8, "first_k_dense_replace": 1, "moe_intermediate_size": 16, "head_dim": 8}
        | {"num_key_value_heads": 4},
    ),
    "scaled embeddings": ("gemma2", {}),
}
DTYPES = [torch.bfloat16, torch.float32]


def assert_as_transformers_loads(folder: Path, dtype: torch.dtype) -> None:
    assert not loaded_differently(folder, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_from_pretrained(
    build_model: Callable[..., Any], tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    kind, changes = CASES[case]
    build_model(kind, dtype=torch.bfloat16, **changes).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_as_transformers_loads(tmp_path, dtype)


def resave(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_only_the_tied_name_is_in_the_file(build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path)
    resave(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert_as_transformers_loads(tmp_path, torch.float32)


def test_tied_by_the_config_and_different_in_the_file(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    build_model("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path)
    resave(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert_as_transformers_loads(tmp_path, torch.float32)


def test_the_bare_model_s_names(build_model: Callable[..., Any], tmp_path: Path) -> None:
    """GPT-2's own checkpoints lack the prefix of the model with a head."""
    kind, changes = CASES["transposed"]
    model = build_model(kind, **changes)
    model.save_pretrained(tmp_path)
    model.transformer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    assert_as_transformers_loads(tmp_path / "bare", torch.float32)


def test_what_is_missing_or_of_another_shape_is_named(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    build_model("qwen2").save_pretrained(tmp_path)
    model = hollow_model(tmp_path, torch.float32)
    name = "model.layers.2.mlp.up_proj.weight"
    resave(tmp_path, lambda t: t.update({name: t[name][:-1].contiguous()}))
    with pytest.raises(SourceError, match=rf"{name} .*\[63, 32\].*\[64, 32\]"):
        Weights(model, tmp_path)
    resave(tmp_path, lambda t: t.pop(name))
    with pytest.raises(SourceError, match=f"lack 1 tensors: {name}"):
        Weights(model, tmp_path)


def test_a_changed_file_is_noticed_while_reading(build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model("qwen2").save_pretrained(tmp_path)
    weights = Weights(hollow_model(tmp_path, torch.float32), tmp_path)
    names = weights.names(Block.layer(1))
    buffer = torch.empty(weights.size(names), dtype=torch.uint8)
    weights.read(names, buffer)
    resave(tmp_path, lambda t: t.update({names[0]: t[names[0]] + 1}))
    with pytest.raises(SourceError, match="has changed since"):
        weights.read(names, buffer)


def test_a_file_cut_short_names_the_tensor(
    build_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_model("qwen2").save_pretrained(tmp_path)
    weights = Weights(hollow_model(tmp_path, torch.float32), tmp_path)
    monkeypatch.setattr(Weights, "_check_unchanged", lambda _: None)  # cut off in the middle of a reading
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40_000])
    with pytest.raises(SourceError, match=r"model\.layers\.\S+ cannot be read: .*shorter"):
        weights.read(weights.names(Block.layer(3)), torch.empty(1 << 20, dtype=torch.uint8))


def test_every_byte_counts_in_the_fingerprint(build_model: Callable[..., Any], tmp_path: Path) -> None:
    build_model("qwen2").save_pretrained(tmp_path / "one")
    build_model("qwen2").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    before = weights_fingerprint(tmp_path / "one")
    assert weights_fingerprint(tmp_path / "shards") == before  # the split into files does not
    file = tmp_path / "one" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    assert weights_fingerprint(tmp_path / "one") != before


def test_digests_are_remembered_until_the_file_changes(
    build_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from talik.model.weights import digests

    monkeypatch.setattr(digests, "RACY", 0)
    build_model("qwen2").save_pretrained(tmp_path)
    made = tensor_digests(tmp_path)
    asked: list[Any] = []
    honest = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda entry: asked.append(entry) or honest(entry))
    assert tensor_digests(tmp_path) == made and not asked
    resave(tmp_path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] + 1}))
    changed = tensor_digests(tmp_path)
    assert {name for name in made if made[name] != changed[name]} == {"model.norm.weight"}


def test_what_is_drawn_while_a_model_is_built_is_hollow_too(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    build_model("diffllama").save_pretrained(tmp_path)
    assert_as_transformers_loads(tmp_path, torch.float32)
