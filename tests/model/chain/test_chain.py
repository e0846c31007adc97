"""The chain gives what the model's own forward gives, and the freeze keeps the trunk out of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from talik.base.errors import ChainError, UsageError
from talik.model.anatomy import parts_of
from talik.model.chain.chain import Chain, run_layers
from talik.model.chain.verify import verify_chain
from talik.model.freeze import freeze

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi",
    "phi3",
    "olmo2",
    "opt",
    "bloom",
    "falcon",
    "stablelm",
    "starcoder2",
    "cohere",
    "granite",
    "mixtral",
    "qwen3_moe",
    "mamba2",
]
EXTRA: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "mamba2": {"num_heads": 8, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 16},
}


def batch(padded: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 380, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded == "right":
        mask[1, 9:] = 0
    if padded == "left":
        mask[1, :5] = 0
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_chain_equals_the_models_own_forward(build_model: Callable[..., Any], family: str) -> None:
    model = build_model(family, **EXTRA.get(family, {}))
    freeze(model, "top.2,norm")
    for padded in ("none", "right", "left"):
        assert verify_chain(model, *batch(padded)) == 0.0, padded


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
def test_chain_in_bf16(build_model: Callable[..., Any], attention: str, tied: bool) -> None:
    model = build_model("qwen2", dtype=torch.bfloat16, tie_word_embeddings=tied)
    model.set_attn_implementation(attention)
    assert verify_chain(model, *batch("right")) == 0.0


def test_verify_chain_sees_a_wrong_layer(
    build_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain that hands a layer other positions than the model does is found out."""
    model = build_model("qwen2")
    honest = Chain.skeleton

    def without_mask(self: Chain, ids: Any, mask: Any = None, *, embed: bool = True) -> Any:
        return honest(self, ids, None, embed=embed)

    monkeypatch.setattr(Chain, "skeleton", without_mask)
    assert verify_chain(model, *batch("left")) > 0


def test_layers_run_in_any_order(build_model: Callable[..., Any]) -> None:
    model = build_model("qwen3")
    chain = Chain(model)
    with torch.no_grad():
        skeleton = chain.skeleton(*batch("right"))
        inputs, outputs, hidden = [], [], skeleton.embedded
        for index in range(4):
            inputs.append(hidden)
            hidden = chain.layer(index, hidden, skeleton.calls[index])
            outputs.append(hidden)
        for index in reversed(range(4)):
            assert torch.equal(chain.layer(index, inputs[index], skeleton.calls[index]), outputs[index])


def test_the_model_is_left_as_it_was(build_model: Callable[..., Any]) -> None:
    model = build_model("llama")
    model.train()
    ids, mask = batch("right")
    before = dict(model.named_parameters())
    verify_chain(model, ids, mask)
    assert model.training and all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert dict(model.named_parameters()).keys() == before.keys()


def test_a_skeleton_makes_no_logits(build_model: Callable[..., Any]) -> None:
    """Around the layers, the head is the largest product of all."""
    model = build_model("llama")
    chain = Chain(model)
    called = []
    model.lm_head.register_forward_hook(lambda *_: called.append(1))
    chain.skeleton(*batch("none"))
    assert not called


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "bloom", "gemma2"])
def test_frozen_is_out_of_the_graph(build_model: Callable[..., Any], family: str) -> None:
    """Only what was asked for has a gradient, and nothing below the cut saves anything for backward."""
    model = build_model(family, **EXTRA.get(family, {}))
    model.activation_checkpointing_enable()  # its hook puts the frozen trunk into the graph
    trained = freeze(model, "top.2,norm")
    chain = Chain(model)
    assert {chain.parts.part(name) for name in trained} == {"layer 2", "layer 3", "norm"}
    skeleton = chain.skeleton(*batch("none"))
    assert not run_layers(chain, range(2), skeleton.embedded, skeleton.calls).requires_grad
    model(input_ids=batch("none")[0], use_cache=False).logits.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trained.keys()


def test_a_head_that_is_trained_is_untied(build_model: Callable[..., Any]) -> None:
    model = build_model("qwen2", tie_word_embeddings=True)
    expected = model(input_ids=batch("none")[0]).logits
    trained = freeze(model, "top.1,norm,head")
    assert "lm_head.weight" in trained and not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.model.embed_tokens.weight.requires_grad
    assert torch.equal(model(input_ids=batch("none")[0]).logits, expected)


def test_more_layers_than_there_are(build_model: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=r"top\.5 needs 5 layers, and the model has 4 layers(.|\n)*0 to 3"):
        freeze(build_model("qwen2"), "top.5")


@pytest.mark.parametrize(
    ("thaw", "parts"),
    [
        ("all", {"embeddings", "layer 0", "layer 1", "layer 2", "layer 3", "norm"}),
        ("layers.0-1, layers.3", {"layer 0", "layer 1", "layer 3"}),
        ("embeddings,head", {"embeddings"}),
        ("norm,top.1", {"layer 3", "norm"}),
    ],
)
def test_what_is_thawed(build_model: Callable[..., Any], thaw: str, parts: set[str]) -> None:
    """With the embeddings, the matrix that a head shares with them is trained in both roles."""
    model = build_model("qwen2", tie_word_embeddings=True)
    trained = freeze(model, thaw)
    assert {parts_of(model).part(name) for name in trained} == parts
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_layers_called_twice_are_refused(
    build_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("qwen2")
    first = model.model.layers[0]
    honest = type(first).forward

    def twice(self: Any, hidden: Any, **kwargs: Any) -> Any:
        if self is first:
            model.model.layers[1](hidden, **kwargs)
        return honest(self, hidden, **kwargs)

    monkeypatch.setattr(type(first), "forward", twice)
    with pytest.raises(ChainError, match="layer 0 calls layer 1"):
        Chain(model)
