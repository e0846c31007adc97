"""Models of many families without storage."""

from __future__ import annotations

from typing import Any

import torch

SMALL = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "n_inner"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 4),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "attention_heads", "num_experts"], 4),
    **dict.fromkeys(
        ["num_key_value_heads", "num_experts_per_tok", "num_local_experts", "shared_expert_gates"], 2
    ),
    **dict.fromkeys(["head_dim", "rotary_dim", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "state_size"], 16),
    **dict.fromkeys(["n_positions", "max_position_embeddings", "vocab_size", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["n_routed_experts", "n_group", "topk_group", "first_k_dense_replace", "num_heads"], 4),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def settable(config: Any, key: str) -> bool:
    own = getattr(type(config), key, None)
    return not isinstance(own, property) or own.fset is not None


def tiny(family: str, **changes: Any) -> Any:
    """A model of four small layers without storage."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base = AutoConfig.for_model(family)
    sizes: dict[str, Any] = {
        key: value
        for key, value in SMALL.items()
        if getattr(base, key, None) is not None and settable(base, key)
    }
    if family == "mamba2":
        sizes |= {"num_heads": 8, "expand": 2}
    kinds = list(dict.fromkeys(getattr(base, "layer_types", None) or []))
    if kinds and settable(base, "layer_types"):
        sizes["layer_types"] = [kinds[i % len(kinds)] for i in range(4)]
    if family == "gpt_neo":
        sizes["attention_types"] = [[["global", "local"], 2]]
    config = AutoConfig.for_model(family, **(sizes | changes))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
