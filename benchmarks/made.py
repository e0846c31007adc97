"""What benchmarks make on the spot: a model of Qwen2.5-7B's shape with random weights, and examples."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from talik.data.examples import Example, Span
from talik.data.reading.rows import Place
from talik.model.weights.safetensors_file import tensor_bytes, write_tensors

QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def qwen_folder(folder: Path, layers: int = 28, **changes: Any) -> Path:
    """Writes config and weights, unless they are there: normal numbers, one tensor in memory at a time."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {**QWEN, "num_hidden_layers": layers, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    tensors = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        write_tensors(file, ((n, t.dtype, tuple(t.shape)) for n, t in tensors.items()))
        for name, tensor in tensors.items():
            file.write(tensor_bytes(_filled(name, tensor, generator)))
    return folder


def _filled(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    for part in flat.split(1 << 24):
        part.copy_(torch.randn(part.numel(), generator=generator) / math.sqrt(tensor.shape[-1]))
    return flat.view(tensor.shape)


def made_examples(lengths: tuple[int, ...], vocabulary: int = 150000) -> list[Example]:
    """Random tokens, the last half of each example trained."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, length in enumerate(lengths):
        ids = array("i", torch.randint(3, vocabulary, (length,), generator=generator).tolist())
        spans = (Span(0, length // 2, False), Span(length // 2, length, True))
        made.append(Example(ids, spans, Place("made", number + 1)))
    return made
