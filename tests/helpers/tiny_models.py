"""A tiny random model of every causal-LM name of Transformers: generic sizes, and what a name needs."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "encoder_layers", "linear_num_key_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads", "num_experts"), 4),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "chunk_size"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window"), 32),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "time_step_rank"), 8),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 256),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "expand": 2,
}
DROP = object()  # among a name's own sizes: not this one
# What the generic sizes do not suit.
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
ZAMBA = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LINEAR = ["linear_attention", "full_attention"] * 2
SPARSE = ["full", "shared"] * 2
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BYTES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GEMMA = ["sliding_attention", "full_attention"] * 3
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 8,
        "layers_block_type": ZAMBA,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "layers_block_type": ZAMBA,
        "num_mem_blocks": 2,
        "use_mamba_kernels": False,
        "adapter_rank": 8,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        "rope_parameters": ROPE,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 2,
        "num_hidden_layers": DROP,
        "num_key_value_heads": 4,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
    },
    "ministral": {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4, "layer_types": LINEAR},
    "phi4_multimodal": {
        "vision_config": {**VISION, "num_channels": 3, "image_size": 28},
        "audio_config": {**VISION, "num_blocks": 1, "ext_pw_out_channel": 64, "nemo_conv_channels": 64},
    },
    "glm_moe_dsa": {"indexer_types": SPARSE, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 4},
    "hy_v4": {"indexer_types": SPARSE, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 4},
    "recurrent_gemma": {
        "attention_window_size": 8,
        "lru_width": 64,
        "block_types": ["recurrent", "attention"],
    },
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": GEMMA,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
    },
    "gemma4_text": {"num_hidden_layers": 6, "layer_types": GEMMA, "num_kv_shared_layers": 2},
    "rwkv": {"attention_hidden_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "prophetnet": {
        "num_hidden_layers": DROP,
        "num_encoder_layers": 2,
        "num_decoder_layers": 4,
        "num_decoder_attention_heads": 4,
        "num_encoder_attention_heads": 4,
        "decoder_ffn_dim": 128,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "reformer": {
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (16, 8),
        "attention_head_size": 16,
        "feed_forward_size": 128,
    },
    "xlnet": {"max_position_embeddings": DROP, "d_head": 16, "d_inner": 128},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "blt": {
        **dict.fromkeys(("patcher_config", "encoder_config", "decoder_config"), BYTES),
        "global_config": {**BYTES, "hidden_size": 128},
        "encoder_hash_byte_group_vocab": 64,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# What a config cannot be made without, or would be large.
BASE: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
}
OWN |= {"gemma3n": OWN["gemma3n_text"], "qwen4_exp": OWN["qwen4_exp_text"]}
OWN |= dict.fromkeys(("gemma4", "gemma4_unified", "gemma4_unified_text"), OWN["gemma4_text"])


def tiny_config(name: str, *, whole: bool = True, **changes: Any) -> Any:
    """A name's config, small. `changes` go over what this file gives, for the text decoder.

    A name whose class holds more than a text decoder gets its whole config, or, without `whole`, that of the
    decoder alone.
    """
    base = AutoConfig.for_model(name, **BASE.get(name, {}))
    text = base.get_text_config(decoder=True)
    small = type(text)(**_sizes(name, text, changes))
    alone = AutoModelForCausalLM._model_mapping.get(type(text), None)
    if _class_of(name) is alone or type(text) is _class_of(name).config_class or (alone and not whole):
        return small
    part = next(key for key in base.sub_configs if getattr(base, key, None) is text)
    setattr(base, part, small)
    for other in (getattr(base, key, None) for key in base.sub_configs if key != part):
        for key, value in SIZES.items() if other is not None else ():
            if _get(other, key) is not None and _free(other, key):
                setattr(other, key, value)
    return base


def _class_of(name: str) -> Any:
    return getattr(transformers, NAMES[name])


def _sizes(name: str, text: Any, changes: dict[str, Any]) -> dict[str, Any]:
    sizes = {key: value for key, value in SIZES.items() if _get(text, key) is not None and _free(text, key)}
    sizes |= {key: 0.0 for key, value in vars(text).items() if "drop" in key and isinstance(value, float)}
    if _free(text, "layer_types") and (kinds := list(dict.fromkeys(_get(text, "layer_types") or []))):
        sizes["layer_types"] = list(itertools.islice(itertools.cycle(kinds), 4))
    if _get(text, "kv_lora_rank"):  # multi-head latent attention: as many heads of keys
        sizes["num_key_value_heads"] = 4
    sizes |= {**OWN.get(name, {}), **changes}
    sizes = {key: value for key, value in sizes.items() if value is not DROP}
    if hasattr(text, "is_decoder"):
        sizes.setdefault("is_decoder", True)
    return sizes


def _free(config: Any, key: str) -> bool:
    """Whether it can be set: some are computed from others."""
    found = getattr(type(config), type(config).attribute_map.get(key, key), None)
    return not isinstance(found, property) or found.fset is not None


def _get(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:  # it differs from layer to layer
        return None


def tiny_model(
    name: str, *, dtype: Any = torch.float32, attention: str = "eager", whole: bool = True, **changes: Any
) -> Any:
    """A random causal LM, every matrix large enough to matter."""
    config = tiny_config(name, whole=whole, **changes)
    known = type(config) in AutoModelForCausalLM._model_mapping
    build = AutoModelForCausalLM.from_config if known else _class_of(name)._from_config
    torch.manual_seed(0)
    model: PreTrainedModel = build(config, dtype=dtype, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()
