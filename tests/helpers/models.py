"""Small random models of every family, and the questions that tests train on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = [
    (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}." + " Yes." * (a % 3))
    for a in range(6)
    for b in range(5)
]
SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(kind: str = "qwen2", *, seed: int = 0, dtype: Any = torch.float32, **changes: Any) -> Any:
    """A random causal LM of a family, small, with weights large enough that every layer matters."""
    config = AutoConfig.for_model(kind)
    for key, value in {**SMALL, **changes}.items():
        if hasattr(config, key) or key in changes:
            with contextlib.suppress(AttributeError):  # derived from others in this family
                setattr(config, key, value)
    if getattr(config, "layer_types", None) and not isinstance(
        vars(type(config)).get("layer_types"), property
    ):
        kinds = list(dict.fromkeys(config.layer_types))
        config.layer_types = [kinds[i % len(kinds)] for i in range(config.num_hidden_layers)]
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
