"""What Transformers 4 makes of an export: the same logits, with every kind of rotary embedding.

The comparison itself runs where TALIK_TRANSFORMERS_4 names a folder made by
`pip install --no-deps --target FOLDER transformers==4.57.1 huggingface_hub==0.35.3 tokenizers==0.22.1`
(`python3 dev.py bench older_readers` makes one).
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
from transformers import AutoConfig, AutoModelForCausalLM

import talik
from talik.files import read_json, write_json

LONG = [1.0, 1.1, 1.2, 1.3]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "another base": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama 3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "local and global": (
        "gemma3_text",
        {
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "long": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": LONG,
                "long_factor": [4 * value for value in LONG],
                "original_max_position_embeddings": 64,
                "partial_rotary_factor": 1.0,
            },
            "original_max_position_embeddings": 64,
        },
    ),
    "a part of the head": (
        "stablelm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
    ),
}
READ = """
import sys, torch
from transformers import AutoModelForCausalLM, __version__
assert __version__.startswith("4."), __version__
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(torch.arange(3, 100)[None]).logits, sys.argv[2])
"""


@pytest.fixture
def export(
    build_model: Callable[..., Any], tokenizer: Any, rows: Path, tmp_path: Path
) -> Callable[[str], tuple[Path, Path]]:
    """Trains a small model of a family for one step: the folders of the source and of the export."""

    def make(name: str) -> tuple[Path, Path]:
        kind, changes = FAMILIES[name]
        build_model(kind, eos_token_id=2, **changes).save_pretrained(tmp_path / "source")
        tokenizer.save_pretrained(tmp_path / "source")
        recipe = talik.Recipe(
            model=str(tmp_path / "source"), data=str(rows), top_layers=1, precision="fp32", steps=1
        )
        talik.train(recipe, tmp_path / "run")
        talik.export(tmp_path / "run", tmp_path / "out")
        return tmp_path / "source", tmp_path / "out"

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_stand_where_older_readers_look(name: str, export: Any) -> None:
    source, out = export(name)
    rope = FAMILIES[name][1]["rope_parameters"]
    first = rope.get("full_attention", rope)
    config = read_json(out / "config.json")
    assert config["rope_theta"] == first["rope_theta"] and config["torch_dtype"] == "float32"
    if first["rope_type"] != "default":
        scaling = config["rope_scaling"]
        assert scaling.get("rope_type", scaling.get("type")) == first["rope_type"]
        assert all(scaling[key] == first[key] for key in ("factor", "short_factor") if key in first)
    if name == "local and global":
        assert config["rope_local_base_freq"] == 1e4
    mine, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (out, source))
    if name != "long":  # whose two forms name the same numbers by other fields
        assert {**mine, "_name_or_path": None} == {**theirs, "_name_or_path": None}


def test_a_config_in_the_older_style_stays_as_it_is(export: Any, rows: Path, tmp_path: Path) -> None:
    source, _ = export("another base")
    config = read_json(source / "config.json")
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "float32", "made_by": "somebody"}
    write_json(source / "config.json", config | {"auto_map": {"AutoConfig": "x.Y"}})
    recipe = talik.Recipe(model=str(source), data=str(rows), top_layers=1, precision="bf16", steps=1)
    talik.train(recipe, tmp_path / "second")
    talik.export(tmp_path / "second", tmp_path / "third")
    assert read_json(tmp_path / "third" / "config.json") == {**config, "torch_dtype": "bfloat16"}


@pytest.mark.skipif("TALIK_TRANSFORMERS_4" not in os.environ, reason="TALIK_TRANSFORMERS_4 names no folder")
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_4_computes_the_same_logits(name: str, export: Any, tmp_path: Path) -> None:
    _, out = export(name)
    path = os.environ["TALIK_TRANSFORMERS_4"]
    done = subprocess.run(
        [sys.executable, "-c", READ, str(out), str(tmp_path / "logits.pt")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = model(torch.arange(3, 100)[None]).logits
    difference = (ours - theirs).abs().max().item() / ours.abs().max().item()
    print(json.dumps({"family": name, "largest difference, relative": difference}))
    assert difference <= 1e-5
