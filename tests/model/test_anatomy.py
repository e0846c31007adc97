"""The parts of a model have the right names over many families, and are counted exactly."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from helpers.tiny_models import tiny_model
from helpers.weightless import tiny
from talik.base.errors import SourceError
from talik.model.anatomy import Parts, anatomy_of, parts_of
from talik.model.freeze import freeze

# family: layers | embeddings | norm | head
PLAIN = "model.layers | embed_tokens | norm | lm_head"
FAMILIES = {
    **dict.fromkeys(["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2"], PLAIN),
    **dict.fromkeys(["gemma3_text", "olmo2", "stablelm", "starcoder2", "cohere2", "granite", "phi3"], PLAIN),
    **dict.fromkeys(["glm4", "smollm3", "deepseek_v3", "olmoe", "exaone4", "gpt_oss"], PLAIN),
    "phi": "model.layers | embed_tokens | final_layernorm | lm_head",
    "persimmon": "model.layers | embed_tokens | final_layernorm | lm_head",
    "lfm2": "model.layers | embed_tokens | embedding_norm | lm_head",
    "gpt2": "transformer.h | wte wpe | ln_f | lm_head",
    "gpt_bigcode": "transformer.h | wte wpe | ln_f | lm_head",
    "gpt_neo": "transformer.h | wte wpe | ln_f | lm_head",
    "gptj": "transformer.h | wte | ln_f | lm_head",
    "codegen": "transformer.h | wte | ln_f | lm_head",
    "falcon": "transformer.h | word_embeddings | ln_f | lm_head",
    "bloom": "transformer.h | word_embeddings word_embeddings_layernorm | ln_f | lm_head",
    "mpt": "transformer.blocks | wte | norm_f | lm_head",
    "gpt_neox": "gpt_neox.layers | embed_in | final_layer_norm | lm_head",
    "opt": "model.decoder.layers | embed_tokens embed_positions project_in | final_layer_norm | lm_head",
    "xglm": "model.layers | embed_tokens | layer_norm | lm_head",
    "biogpt": "biogpt.layers | embed_tokens embed_positions | layer_norm | output_projection",
    "mamba2": "backbone.layers | embeddings | norm_f | lm_head",
    "rwkv": "rwkv.blocks | embeddings | ln_out | head",
}


def under(prefix: str, names: str) -> set[str]:
    return {f"{prefix}.{name}" for name in names.split()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_family(family: str) -> None:
    changes = {"word_embed_proj_dim": 32} if family == "opt" else {}
    model = tiny(family, **changes)
    layers, embeddings, norm, head = FAMILIES[family].split(" | ")
    parent = layers.rpartition(".")[0]
    parts = parts_of(model)
    assert (parts.layers, parts.count, parts.head) == (layers, 4, head)
    assert set(parts.names("embeddings")) == under(parent, embeddings)
    assert parts.embedding in parts.names("embeddings")
    assert model.get_submodule(parts.embedding) is model.get_input_embeddings()
    assert set(parts.names("norm")) == under(parent, norm)
    assert parts.names("head") == (head,)
    assert parts.names("other") == ((f"{parent}.project_out",) if family == "opt" else ())
    assert parts.tied == (model.get_submodule(head).weight is model.get_input_embeddings().weight)
    for index, layer in enumerate(model.get_submodule(layers)):
        assert {parts.part(f"{layers}.{index}.{name}") for name, _ in layer.named_parameters()} == {
            f"layer {index}"
        }


@pytest.mark.filterwarnings("ignore")  # of Transformers, while it builds models
@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("gemma3n_text", "per_layer_model_projection per_layer_projection_norm altup_projections.0"),
        ("gemma4_assistant", "per_layer_model_projection per_layer_projection_norm"),  # tokens do not suffice
        ("rembert", "embedding_hidden_mapping_in"),
    ],
)
def test_modules_that_run_before_the_layers_count_as_embeddings(name: str, before: str) -> None:
    parts = parts_of(tiny_model(name))
    parent = parts.layers.rpartition(".")[0]
    assert under(parent, before) <= set(parts.names("embeddings"))


def test_a_part_is_found_by_the_longest_name() -> None:
    pieces = {"model": "other", "model.embed": "embeddings", "model.embed.norm": "norm", "head": "head"}
    parts = Parts("model.layers", 12, "model.embed", "head", False, pieces)
    names = {
        "model.layers.0.a": "layer 0",
        "model.layers.11.b.c": "layer 11",
        "model.layers_norm.weight": "other",
        "model.embed.weight": "embeddings",
        "model.embed.norm.weight": "norm",
        "model.scale": "other",
        "head.weight": "head",
        "elsewhere.weight": "other",
    }
    assert {name: parts.part(name) for name in names} == names


def test_tied_and_live_models() -> None:
    assert parts_of(tiny("llama", tie_word_embeddings=True)).tied
    assert not parts_of(tiny("llama", tie_word_embeddings=False)).tied
    meta = tiny("qwen2", tie_word_embeddings=False)
    assert parts_of(meta.to_empty(device="cpu")) == parts_of(meta)


def test_a_larger_list_of_another_length_is_not_the_layers() -> None:
    model = tiny("llama")
    model.model.vision = torch.nn.ModuleList(torch.nn.Linear(999, 999, device="meta") for _ in range(2))
    parts = parts_of(model)
    assert (parts.layers, parts.count) == ("model.layers", 4)
    assert parts.part("model.vision.0.weight") == "other"


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_parts_where_the_source_code_is_not_there(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    expected = parts_of(model)

    def not_there(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", not_there)
    assert parts_of(model) == expected


def test_a_model_without_layers_is_refused() -> None:
    model = tiny("llama")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(SourceError, match="LlamaForCausalLM has no list of layers"):
        parts_of(model)


def test_counts_by_part() -> None:
    own = anatomy_of(tiny("gpt2", tie_word_embeddings=True, dtype="float16"))
    norms, attention = 2 * 2 * 64, (64 * 192 + 192) + (64 * 64 + 64)
    layer = norms + attention + (64 * 256 + 256) + (256 * 64 + 64)
    assert own.parts["embeddings"] == 64 * 64 * 2 and own.layers == (layer,) * 4
    assert own.parts["norm"] == 2 * 64 and own.parts["head"] == own.parts["other"] == 0 and own.tied
    assert own.parameters == 64 * 64 * 2 + 4 * layer + 2 * 64 and own.bytes == 2 * own.parameters
    assert list(own.parts) == [
        "embeddings",
        "layer 0",
        "layer 1",
        "layer 2",
        "layer 3",
        "norm",
        "head",
        "other",
    ]
    assert (own.facts["hidden_size"], own.facts["num_hidden_layers"]) == (64, 4), "n_embd and n_layer"


def test_a_tower_beside_the_language_model_is_never_trained() -> None:
    """Its norms are not the model's: text does not go through them."""
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {**text, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    text |= {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    assert "outside" in parts_of(model).pieces.values()
    for line in ("top.1,norm", "all"):
        trained = freeze(model, line)
        assert trained and all(name.startswith("model.language_model.") for name in trained), line
    assert sum(anatomy_of(model).parts.values()) == sum(weight.numel() for weight in model.parameters())
