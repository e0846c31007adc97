"""The trunk pass: layer by layer from the files, the same numbers as the whole model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.training import load_from, make_examples, make_plan, make_recipe, run_trunk, top_at
from talik.base.errors import ChainError
from talik.base.events import Progress, Status, silent
from talik.data.examples import Example
from talik.model.block import EMBEDDINGS, TAIL, Block
from talik.model.chain.chain import Chain
from talik.training.trunk.trunk import trunk_facts, trunk_states


@pytest.mark.parametrize("where", ["resident", "streamed"])
@pytest.mark.parametrize("hidden_bytes", [1, 1 << 30])
def test_states_are_those_of_the_model_in_memory(
    build_model: Callable[..., Any],
    examples: list[Example],
    tmp_path: Path,
    where: str,
    hidden_bytes: int,
) -> None:
    """In one shard, or in one shard per batch group."""
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model("qwen2", dtype=dtype)
        chain = Chain(model)
        folder = tmp_path / str(dtype)
        loaded = load_from(model, folder, trunk=where, hidden_bytes=hidden_bytes)
        recipe = make_recipe(cache=str(folder / "cache"))
        with trunk_states(loaded, [examples], recipe, silent) as [states]:
            assert states is not None
            read = states.read([5, 0, 3])
        assert read.dtype == dtype and read.shape[:2] == (3, 20)
        for row, index in zip(read, (5, 0, 3), strict=True):
            length = examples[index].length
            assert states is not None
            alone = run_trunk(chain, 2, torch.tensor([list(examples[index].input_ids)]))
            assert torch.equal(row[:length], alone[0]) and not row[length:].any()
        shards = len(list(folder.glob("cache/*/shard-*.bin")))
        assert shards == (1 if hidden_bytes > 1 else 5)


def test_a_residual_in_fp32_is_cached_in_fp32(
    build_model: Callable[..., Any], examples: list[Example], tmp_path: Path
) -> None:
    """A bf16 Mamba 2 has fp32 hidden states: with the size of bf16 each would overwrite the next."""
    sizes = {"num_heads": 8, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 16}
    model = build_model("mamba2", dtype=torch.bfloat16, **sizes)
    chain, loaded = Chain(model), load_from(model, tmp_path / "model")
    recipe = make_recipe(cache=str(tmp_path / "cache"))
    with trunk_states(loaded, [examples], recipe, silent) as [states]:
        for index, example in enumerate(examples):
            assert states is not None
            alone = run_trunk(chain, 2, torch.tensor([list(example.input_ids)]))
            assert alone.dtype == torch.float32 and torch.equal(states.read([index]), alone)


def test_what_is_cached_is_not_computed_again(
    build_model: Callable[..., Any], examples: list[Example], tmp_path: Path
) -> None:
    """After rows are added only batch groups with them are computed; two sets share a common batch group."""
    loaded = load_from(build_model("qwen2"), tmp_path / "model")
    recipe = make_recipe(cache=str(tmp_path / "cache"))

    def computed(*sets: list[Example]) -> int:
        events: list[Any] = []
        with trunk_states(loaded, list(sets), recipe, events.append):
            pass
        return max((event.total for event in events if isinstance(event, Progress)), default=0)

    added = make_examples((14, 33), seed=1)
    assert computed(examples, examples) == sum(example.length for example in examples)
    assert computed(examples) == 0
    assert computed([*examples, *added]) == 3 * 14 + 33  # the group of length 14 has another member


def test_reads_the_trunk_only_and_once_per_shard(
    build_model: Callable[..., Any], examples: list[Example], tmp_path: Path
) -> None:
    loaded = load_from(build_model("qwen2", tie_word_embeddings=False), tmp_path / "model")
    weights = loaded.weights
    trunk = [name for block in (EMBEDDINGS, Block.layer(0), Block.layer(1)) for name in weights.names(block)]
    said: list[Any] = []
    recipe = make_recipe(cache=str(tmp_path / "cache"))
    before = loaded.store.traffic.bytes
    with trunk_states(loaded, [examples], recipe, said.append):
        pass
    checked = weights.bytes_in_files(
        [*trunk, *(n for block in (Block.layer(2), Block.layer(3), TAIL) for n in weights.names(block))]
    )
    assert loaded.store.traffic.bytes - before == checked + weights.bytes_in_files(trunk)
    assert all(parameter.is_meta for parameter in loaded.chain.model.parameters())
    assert any(isinstance(event, Status) and "of weights, waited" in event.text for event in said)


def test_facts_cover_weights_cut_and_how_it_is_computed(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = build_model("qwen2", tie_word_embeddings=False)
    loaded = load_from(model, tmp_path / "one")
    name = loaded.weights.fingerprint(loaded.weights.trunk_names(2))
    facts = trunk_facts(loaded.chain, 2, name, loaded.plan)
    other = make_plan(top_at(loaded.chain, 2), threads=7)
    assert trunk_facts(loaded.chain, 2, name, other) != facts
    assert loaded.weights.fingerprint(loaded.weights.trunk_names(1)) != name
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] += 1
        model.lm_head.weight[0, 0] += 1  # above the cut: the same trunk
        above = load_from(model, tmp_path / "two").weights
        assert above.fingerprint(above.trunk_names(2)) == name
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
        below = load_from(model, tmp_path / "three").weights
        assert below.fingerprint(below.trunk_names(2)) != name


def test_a_chain_that_differs_is_refused(
    build_model: Callable[..., Any], examples: list[Example], tmp_path: Path, monkeypatch: Any
) -> None:
    loaded = load_from(build_model("qwen2"), tmp_path / "model")
    honest = Chain.layer

    def wrong(self: Chain, index: int, hidden: torch.Tensor, call: Any) -> torch.Tensor:
        return honest(self, index, hidden, call) + (index == 3) * 1e-3

    monkeypatch.setattr(Chain, "layer", wrong)
    passing = trunk_states(loaded, [examples], make_recipe(cache=str(tmp_path / "cache")), silent)
    with pytest.raises(ChainError, match=r"chain of Qwen2ForCausalLM differs .* by 0\.00"), passing:
        pass
