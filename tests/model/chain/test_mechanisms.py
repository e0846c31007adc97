"""One model for every kind of mechanism that a chain must get along with, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.tiny_models import tiny_model
from talik.base.errors import ChainError, UsageError
from talik.model.chain.chain import Chain, run_layers
from talik.model.chain.verify import verify_chain
from talik.model.freeze import freeze
from talik.plan.ways import wanted_cut
from talik.recipe.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # Transformers' own, while it builds models

MECHANISMS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {},  # keys and values shared across layers, four streams, inputs per layer
    "gemma4_text": {},
    "zaya": {},  # a second tensor per token, and hidden states in fp32
    "glm_moe_dsa": {},  # indices of keys handed to the next layer
    "hy_v4": {},  # streams side by side, and indices of keys
    "deepseek_v3": {},  # latent attention and a mixture of experts
    "jamba": {},  # recurrent state
    "mamba2": {},
    "qwen3_5_text": {},  # linear attention
    "zamba2": {},  # embedded tokens in every call, blocks that share weights
    "openai-gpt": {},  # a list in place of a tuple
    "phi": {},
}


def batch(padding: str, length: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 250, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0 if padding == "right" else 1
    mask[1, :5] = 0 if padding == "left" else 1
    return ids, mask


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_is_exact(name: str) -> None:
    model = tiny_model(name, **MECHANISMS[name])
    chain = Chain(model)
    cut, _ = chain.lowest_cut(len(chain.layers) - 1)
    freeze(model, f"top.{len(chain.layers) - cut},norm")
    for padding in ("right", "left"):
        assert verify_chain(model, *batch(padding)) == 0.0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 4}),
        ("gemma2", {"sliding_window": 4, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0}),
        ("granite", {"logits_scaling": 4.0, "tie_word_embeddings": True}),
        ("cohere", {"tie_word_embeddings": False}),
    ],
)
def test_windows_caps_and_scales(name: str, changes: dict[str, Any], dtype: Any, attention: str) -> None:
    if name == "gemma2" and attention == "sdpa":
        pytest.skip("caps of attention scores exist in eager alone")
    model = tiny_model(name, dtype=dtype, attention=attention, **changes)
    for padding in ("none", "right", "left"):
        assert verify_chain(model, *batch(padding)) == 0.0


def test_the_cut_moves_below_shared_keys() -> None:
    chain = Chain(tiny_model("gemma3n_text"))
    cut, reason = chain.lowest_cut(4)
    assert cut == 2 and reason == "layer 4 uses values of layer 2 other than its hidden states"
    assert [chain.lowest_cut(wanted)[0] for wanted in range(7)] == [0, 1, 2, 2, 2, 2, 6]
    assert chain.calls_need_embeddings and chain.width_at(2) == 4 * 64


def test_the_cut_moves_below_shared_indices() -> None:
    chain = Chain(tiny_model("glm_moe_dsa"))
    assert [chain.lowest_cut(wanted)[0] for wanted in range(5)] == [0, 0, 2, 2, 4]


def test_a_second_tensor_per_token_is_handed_on() -> None:
    chain = Chain(tiny_model("zaya", dtype=torch.bfloat16))
    assert chain.lowest_cut(3) == (3, None)
    assert chain.width_at(3) > chain.width_at(0) == 64
    assert chain.dtype_at(3) == torch.float32


def test_gradients_flow_through_shared_keys() -> None:
    """The keys of the layer that gives them are trained by the layers that take them."""
    model, (ids, mask) = tiny_model("gemma3n_text"), batch("right")
    freeze(model, "top.4,norm")
    weights = [p for p in model.parameters() if p.requires_grad]
    counted = mask.bool()
    plain = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[counted].square().mean()
    expected = torch.autograd.grad(plain, weights, allow_unused=True)
    chain = Chain(model)
    skeleton = chain.skeleton(ids, mask)
    hidden = run_layers(chain, range(2), skeleton.embedded, skeleton.calls).detach()
    fresh = chain.skeleton(ids, mask, embed=False)
    rows = run_layers(chain, range(2, 6), hidden, fresh.calls)[counted]
    found = torch.autograd.grad(chain.tail(rows[None]).square().mean(), weights, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("hrm_text", {}, "its layers are called more than once"),
        ("xlm", {}, "it computes with hidden states between its layers"),
        ("inkling2_text", {}, "its tail needs"),
        ("reformer", {}, "its tail needs"),
        ("rwkv", {}, "its forward changes its own weights"),
        ("prophetnet", {}, "is not a vector per token"),
        ("mllama", {}, "it does not call layers 3"),
        ("xlnet", {}, "it is not a causal decoder"),
        ("bert", {"is_decoder": False}, "it is not a causal decoder"),
        ("roberta", {"is_decoder": False}, "it is not a causal decoder"),
        ("musicgen", {}, "it is a decoder of sound"),
    ],
)
def test_refused_by_name(name: str, changes: dict[str, Any], reason: str) -> None:
    model = tiny_model(name, **changes)
    with pytest.raises(ChainError, match=f"{type(model).__name__} is not a chain of layers: .*{reason}"):
        Chain(model)


def test_the_models_own_weights_show_that_it_is_not_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the look without weights miss it."""
    monkeypatch.setattr("talik.model.chain.facts._check_causal", lambda hidden: None)
    with pytest.raises(ChainError, match="not a causal decoder"):
        verify_chain(tiny_model("bert", is_decoder=False), *batch("none"))


def test_router_logits_are_refused() -> None:
    with pytest.raises(UsageError, match="Set output_router_logits to false"):
        Chain(tiny_model("mixtral", output_router_logits=True))


def test_embeddings_that_calls_are_made_of_cannot_be_thawed() -> None:
    recipe = Recipe(model="-", data="-", thaw="all")
    with pytest.raises(UsageError, match="Gemma3nForCausalLM passes token embeddings"):
        wanted_cut(recipe, Chain(tiny_model("gemma3n_text")))
