"""A chain without weights, its check while layers are loaded one by one, rotary tables, dropout."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._C import _len_torch_function_stack

from helpers.tiny_models import tiny_model
from talik.model.chain.chain import Chain, run_layers
from talik.model.chain.verify import verify_chain, verify_layers

pytestmark = pytest.mark.filterwarnings("ignore")
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 16,
    "factor": 2.0,
}


def tokens(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(length))


def to_meta(module: Any) -> dict[str, torch.Tensor]:
    """Unloads a module's weights, and gives them back by name. Buffers that no file holds stay."""
    held = dict(module.state_dict())
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
    return held


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bloom", "deepseek_v3", "mamba2", "gemma2"])
def test_layers_and_embeddings_are_not_needed(name: str) -> None:
    whole = tiny_model(name)
    hollow = copy.deepcopy(whole)
    chain, ids = Chain(whole), tokens(9, 2)
    expected = chain.skeleton(ids, embed=False)
    hidden = run_layers(chain, range(4), chain.skeleton(ids).embedded, expected.calls)
    untied = None if whole.config.tie_word_embeddings else chain.tail(hidden)
    other = Chain(hollow)
    for layer in other.layers:
        to_meta(layer)
    if untied is not None:
        to_meta(other.embedding)
    other = Chain(hollow)
    assert other.device.type == "cpu" and other.width_at(2) == chain.width_at(2)
    calls = other.skeleton(ids, embed=untied is None).calls
    again = run_layers(chain, range(4), chain.skeleton(ids).embedded, calls)
    assert torch.equal(again, hidden)
    assert torch.equal(other.tail(hidden), chain.tail(hidden))


def test_a_chain_leaves_unloaded_weights_alone() -> None:
    model = tiny_model("llama")
    to_meta(model)
    before = dict(model.named_parameters())
    chain = Chain(model, "cpu")
    assert chain.device == torch.device("cpu") and chain.lowest_cut(3) == (3, None)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["qwen2", "gemma3n_text", "zaya"])
def test_layers_are_verified_one_by_one(name: str) -> None:
    model = tiny_model(name)
    chain, loaded = Chain(model), list[int]()
    held = [to_meta(layer) for layer in chain.layers]

    @contextlib.contextmanager
    def around(index: int) -> Iterator[None]:
        loaded.append(index)
        chain.layers[index].load_state_dict(held[index], assign=True)
        yield
        to_meta(chain.layers[index])

    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    assert verify_layers(chain, tokens(9, 2), mask, around) == 0.0
    assert loaded == list(range(len(chain.layers)))


def test_a_layer_that_differs_the_second_time_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    layer, times = model.model.layers[3], []
    honest = type(layer).forward

    def drifting(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if not _len_torch_function_stack():  # not while the model is watched
            times.append(1)
        return honest(self, hidden, *args, **kwargs) + (1.0 if self is layer and len(times) > 8 else 0.0)

    monkeypatch.setattr(type(layer), "forward", drifting)
    assert verify_chain(model, tokens(9)) > 0


@pytest.mark.parametrize("rope", [DYNAMIC, LONG])
def test_rotary_tables_do_not_depend_on_what_ran_before(rope: dict[str, Any]) -> None:
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    chain, ids = Chain(model), tokens(20)
    with torch.no_grad():
        first = chain.skeleton(ids)
        alone = run_layers(chain, range(4), first.embedded, first.calls)
        for length in (50, 18, 5, 50):
            model(input_ids=tokens(length), use_cache=False)
            chain.skeleton(tokens(length + 1))
            again = chain.skeleton(ids)
            assert torch.equal(run_layers(chain, range(4), again.embedded, again.calls), alone), length
    assert verify_chain(model, ids) == 0.0


def test_examples_that_share_rotary_tables() -> None:
    dynamic = Chain(tiny_model("llama", rope_parameters=DYNAMIC, max_position_embeddings=16))
    assert dynamic.rope_group(3) == dynamic.rope_group(16) != dynamic.rope_group(17)
    assert dynamic.rope_group(17) != dynamic.rope_group(18)
    long = Chain(tiny_model("llama", rope_parameters=LONG, max_position_embeddings=64))
    assert long.rope_group(3) == long.rope_group(16) != long.rope_group(17) == long.rope_group(60)
    plain = Chain(tiny_model("llama"))
    assert plain.rope_group(3) == plain.rope_group(10_000)


@pytest.mark.parametrize("rope", [DYNAMIC, LONG])
@pytest.mark.parametrize("lengths", [(9, 15), (20, 20), (20, 9)])
def test_a_batch_of_one_group_gets_the_tables_of_each_alone(
    rope: dict[str, Any], lengths: tuple[int, int]
) -> None:
    chain = Chain(tiny_model("llama", rope_parameters=rope, max_position_embeddings=16))
    alike = chain.rope_group(lengths[0]) == chain.rope_group(lengths[1])
    tables = [chain.skeleton(tokens(n)).calls[0].kwargs["position_embeddings"][0] for n in lengths]
    longest = tables[lengths.index(max(lengths))]
    assert torch.equal(longest[:, : min(lengths)], tables[lengths.index(min(lengths))]) == alike


def test_dropout_is_the_same_with_the_same_random_state() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    chain = Chain(model)
    skeleton = chain.skeleton(tokens(9))
    chain.layers[3].train()

    def recomputed(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return chain.layer(3, skeleton.embedded, skeleton.calls[3])

    assert torch.equal(recomputed(1), recomputed(1))
    assert not torch.equal(recomputed(1), recomputed(2))
