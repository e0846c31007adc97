"""Exports have the same logits in Transformers 4 as in Transformers 5, for families with unusual rope.

TALIK_TRANSFORMERS_4 names a folder made by `pip install --no-deps --target FOLDER` of transformers 4 and the
huggingface_hub and tokenizers that it asks for; `python3 dev.py bench old_readers` makes one and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import talik
from helpers.old_reader import TEXT, ids_for
from talik.base.files import read_json, write_json
from talik.model.folder import ModelFolder
from talik.model.source.older_readers import older_config
from talik.model.tokenizer import load_tokenizer
from talik.plan.ways import choose
from talik.recipe.recipe import Recipe

pytestmark = [
    pytest.mark.skipif("TALIK_TRANSFORMERS_4" not in os.environ, reason="TALIK_TRANSFORMERS_4 is not set"),
    pytest.mark.filterwarnings("ignore"),
]

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LATENT |= {
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
LATENT |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "num_key_value_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2, base 1e6": ("qwen2", {"rope_theta": 1e6, "rope_type": "default"}, {}),
    "llama 3": ("llama", LLAMA3, {}),
    "gemma 3": (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
        {"sliding_window": 32},
    ),
    "phi 3 longrope": (
        "phi3",
        {"rope_type": "longrope", "rope_theta": 2e4, "partial_rotary_factor": 1.0, **FACTORS},
        {"original_max_position_embeddings": 64},
    ),
    "qwen3 yarn": ("qwen3", {"rope_theta": 1e6, **YARN}, {}),
    "deepseek 3 yarn": (
        "deepseek_v3",
        {"rope_theta": 2e4, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1, **YARN},
        LATENT,
    ),
    "olmo 3 yarn": (
        "olmo3",
        {
            "full_attention": {"rope_theta": 5e5, **YARN},
            "sliding_attention": {"rope_theta": 5e5, "rope_type": "default"},
        },
        {"sliding_window": 32},
    ),
    "stablelm, half": (
        "stablelm",
        {"rope_theta": 3e4, "partial_rotary_factor": 0.5, "rope_type": "default"},
        {},
    ),
    "glm, half": ("glm", {"rope_theta": 3e4, "partial_rotary_factor": 0.5, "rope_type": "default"}, {}),
    "phi, half": ("phi", {"rope_theta": 3e4, "partial_rotary_factor": 0.5, "rope_type": "default"}, {}),
    "gpt-neox, half": (
        "gpt_neox",
        {"rope_theta": 3e4, "partial_rotary_factor": 0.5, "rope_type": "default"},
        {},
    ),
}
NEW = ("rope_parameters", "dtype", "layer_types")


def as_transformers_4_wrote_it(file: Path) -> None:
    """config.json with the former keys alone."""
    fields = older_config(read_json(file))
    write_json(file, {key: value for key, value in fields.items() if key not in NEW})


def by_transformers_4(folder: Path, file: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "old_reader.py")],
        input=json.dumps({str(folder): str(file)}),
        env={**os.environ, "PYTHONPATH": os.environ["TALIK_TRANSFORMERS_4"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["transformers"].startswith("4.")
    return said["found"][str(folder)]


def logits_of(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(input_ids=ids_for(model.config.vocab_size), use_cache=False).logits


@pytest.mark.parametrize("written_by", [4, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_logits(
    name: str, written_by: int, build_model: Callable[..., Any], tokenizer: Any, rows: Path, tmp_path: Path
) -> None:
    disable_progress_bar()
    family, rope, changes = FAMILIES[name]
    source, out = tmp_path / "source", tmp_path / "out"
    build_model(family, eos_token_id=2, rope_parameters=rope, **changes).save_pretrained(source)
    tokenizer.save_pretrained(source)
    if written_by == 4:
        as_transformers_4_wrote_it(source / "config.json")
    fields = {"model": str(source), "data": str(rows), "top_layers": 2, "steps": 1, "precision": "fp32"}
    recipe = Recipe.model_validate(fields)
    talik.train(recipe, tmp_path / "run", plan=choose(recipe, ModelFolder(source)))
    talik.export(tmp_path / "run", out)
    said = by_transformers_4(out, tmp_path / "logits.pt")
    theirs, ours, exact = (
        torch.load(tmp_path / "logits.pt"),
        logits_of(out, torch.float32),
        logits_of(out, torch.float64),
    )
    between, own = ((one - other).abs().max().item() for one, other in ((theirs, ours), (ours, exact)))
    print(f"\n{name}, written by {written_by}: {between:.3g} between 4 and 5, {own:.3g} to fp64")
    assert between <= 2 * own
    found = load_tokenizer(out)
    assert said["ids"] == found(TEXT).input_ids and said["eos"] == [2]
    assert said["chat"] == found.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
