"""A tiny llama and the GGUF file that llama.cpp would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def tiny_llama() -> dict[str, torch.Tensor]:
    """Weights that float16 and bfloat16 hold exactly, under the names that Transformers gives them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    return {name: torch.randint(-64, 64, weight.shape) / 64 for name, weight in model.state_dict().items()}


def gguf_name(name: str) -> str:
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{key}_proj": f"attn_{key}" for key in "qkv"},
        **{f"mlp.{key}_proj": f"ffn_{key}" for key in ("gate", "up", "down")},
    }
    stem = name.removesuffix(".weight")
    if stem in names:
        return f"{names[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{parts[part]}.weight"


def write_gguf(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A llama as llama.cpp writes it, q and k interleaved; down_proj in Q8_0, other matrices in float16."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A Title/of the file")
    writer.add_vocab_size(64)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<s>", "</s>", "<|endoftext|>", "a", "b", "ab", *(chr(code) for code in range(33, 91))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 62)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in weights.items():
        data = weight.numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            heads = 4 if "q_proj" in name else 2
            data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        if "down_proj" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), data.astype(np.float16) if data.ndim > 1 else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
