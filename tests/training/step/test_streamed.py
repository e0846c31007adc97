"""The streamed top gives the same numbers as the resident one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.training import (
    assert_same,
    load_from,
    make_examples,
    make_recipe,
    plain_loss,
    step_of_all,
    trained,
)
from talik.base.events import silent
from talik.training.memory.keys import layer_input, master
from talik.training.memory.scratch import TieredScratch
from talik.training.run.loop import ScalarMonitor
from talik.training.step.step import prepare_top
from talik.training.step.top import World
from talik.training.step.update import prepare
from talik.training.trunk.trunk import trunk_states

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": False}),
    ("gemma", {}),
    ("gemma2", {"final_logit_softcapping": 5.0}),
    ("gemma3_text", {}),
    ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0}),
    ("gpt_neox", {}),
    ("gptj", {"rotary_dim": 4}),
    ("granite", {"logits_scaling": 4.0}),
    ("cohere", {}),
    ("olmo2", {}),
    ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.0}),
    ("mixtral", {"num_local_experts": 4}),
    ("phi", {}),
    ("phi3", {}),
    ("starcoder2", {}),
    ("stablelm", {}),
    ("bloom", {"n_layer": 4, "n_head": 4}),
    ("mamba2", {"num_heads": 8, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 16}),
    ("falcon", {}),
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_streamed_is_resident_bit_for_bit(
    build_model: Callable[..., Any], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = build_model(family, **changes)
    recipe = make_recipe(precision="fp32", clip=0.1)
    resident = trained(model, tmp_path / "resident", recipe)
    assert_same(trained(model, tmp_path / "streamed", recipe, top="streamed"), resident)
    before = dict(model.named_parameters())
    assert all(not torch.equal(tensor, before[name]) for name, tensor in resident[0].items())


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("qwen2", True), ("gpt2", True), ("gemma2", True), ("bloom", True)]
)
def test_everything_trained_is_the_plain_model(
    build_model: Callable[..., Any], tmp_path: Path, family: str, tied: bool
) -> None:
    """Including the embeddings, tied or not, against autograd over the whole model."""
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    model = build_model(family, tie_word_embeddings=tied, **off)
    rate = 0.01
    fields: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0}
    recipe = make_recipe(precision="fp32", thaw="all", **fields)
    plan = {"cache": "none"}
    resident = trained(model, tmp_path / "one", recipe, steps=1, **plan)
    streamed = trained(model, tmp_path / "two", recipe, steps=1, top="streamed", **plan)
    for name, tensor in resident[0].items():  # a tied matrix sums its two roles in another order
        assert torch.allclose(tensor, streamed[0][name], rtol=1e-6, atol=1e-7), name
    examples = make_examples()
    loss = plain_loss(model, examples, sum(example.trained_tokens for example in examples))
    loss.backward()
    assert resident[1][0] == pytest.approx(loss.item(), rel=1e-6)
    assert resident[0].keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        moved, rounding = (parameter - resident[0][name]) / rate, 2e-5 + 1e-3 * parameter.grad.abs().max()
        assert torch.allclose(moved, parameter.grad, rtol=1e-3, atol=rounding), name


@pytest.mark.parametrize(
    ("precision", "clip", "state", "inputs"),
    [
        ("bf16", 0.1, "disk", "disk"),
        ("bf16", "last", "memory", "disk"),
        ("fp32", "last", "disk", "memory"),
        ("fp32", 0, "memory", "memory"),
        ("bf16-sr", "last", "memory", "memory"),
        ("bf16", 0.1, "ram", "ram"),
    ],
)
def test_offloading_and_clipping_give_the_same_bits(
    build_model: Callable[..., Any], tmp_path: Path, precision: str, clip: Any, state: str, inputs: str
) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = build_model("qwen2", dtype=dtype, tie_word_embeddings=False)
    recipe = make_recipe(precision=precision, clip=clip, thaw="top.3,norm,head")
    resident = trained(model, tmp_path / "one", recipe, steps=3)
    places = {"top": "streamed", "state": state, "inputs": inputs}
    assert_same(trained(model, tmp_path / "two", recipe, steps=3, **places), resident)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adafactor", "muon", "sgd"])
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_offloaded_state_of_a_resident_top(
    build_model: Callable[..., Any], tmp_path: Path, optimizer: str, tier: str
) -> None:
    """Offloaded state is copied to the device slice by slice, and back."""
    model, recipe = build_model("qwen2"), make_recipe(precision="fp32", optimizer=optimizer)
    expected = trained(model, tmp_path / "one", recipe, steps=3)
    assert_same(trained(model, tmp_path / "two", recipe, steps=3, state=tier), expected)


def test_the_source_is_never_written(build_model: Callable[..., Any], tmp_path: Path) -> None:
    model = build_model("qwen2")
    model.save_pretrained(tmp_path / "again")
    trained(model, tmp_path, make_recipe(precision="fp32", clip="last"), top="streamed")
    files = [tmp_path / folder / "model.safetensors" for folder in ("model", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_layer_that_runs_again_has_the_same_dropout(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    """With one micro-batch dropout draws its masks in the order of the layers, streamed or not."""
    model = build_model("gpt2", attn_pdrop=0.3, resid_pdrop=0.3)
    recipe, found = make_recipe(precision="fp32", clip=0), []
    plans: list[dict[str, Any]] = [{}, {"recompute": True}, {"top": "streamed"}]
    for number, plan in enumerate(plans):
        torch.manual_seed(3)
        place = tmp_path / str(number)
        found.append(trained(model, place, recipe, steps=1, micro_batch_tokens=200, **plan))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    without = trained(
        build_model("gpt2", attn_pdrop=0.0, resid_pdrop=0.0), tmp_path / "without", recipe, steps=1
    )
    assert without[1][0] != found[0][1][0]


def test_streamed_layers_are_read_once_per_direction(build_model: Callable[..., Any], tmp_path: Path) -> None:
    """For any number of micro-batches in a step."""
    model = build_model("qwen2")
    reads: dict[int, int] = {}
    for tokens in (20, 200):
        loaded = load_from(model, tmp_path / f"{tokens}", top="streamed", micro_batch_tokens=tokens)
        recipe = make_recipe(precision="fp32", cache=str(tmp_path / "cache"), clip="last")
        examples = make_examples()
        with trunk_states(loaded, [examples], recipe, silent) as [states]:
            top = loaded.top()
            with loaded.working(top, tmp_path / "work") as scratch:
                prepare_top(top, recipe, loaded.store, scratch)
                before = loaded.store.traffic.bytes
                world = World(loaded.store, scratch, ScalarMonitor())
                batches = step_of_all(loaded, top, examples, states, world, recipe, step=1)
                reads[len(batches)] = loaded.store.traffic.bytes - before
        assert loaded.store.traffic.written > 0
    assert len(reads) == 2 and len(set(reads.values())) == 1
    assert all(a != b for a, b in itertools.combinations(reads, 2))


@pytest.mark.parametrize("plan", [{"top": "streamed"}, {"recompute": True}])
def test_a_head_alone(build_model: Callable[..., Any], tmp_path: Path, plan: dict[str, Any]) -> None:
    """The top has no layer then."""
    model = build_model("qwen2", tie_word_embeddings=False)
    recipe = make_recipe(precision="fp32", thaw="norm,head")
    resident = trained(model, tmp_path / "resident", recipe)
    assert_same(trained(model, tmp_path / "streamed", recipe, **plan), resident)


def test_an_fp32_weight_has_a_separate_master(tmp_path: Path) -> None:
    """The memory of a streamed weight is reused for another layer."""
    weight = torch.nn.Parameter(torch.arange(4.0))
    scratch = TieredScratch(torch.device("cpu"), tmp_path, lambda kind: "memory")
    prepare([("a", weight)], make_recipe(precision="bf16"), scratch)
    with torch.no_grad():
        weight.zero_()
    assert scratch[master("a")].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_dropped_layer_input_frees_its_storage(tmp_path: Path) -> None:
    scratch = TieredScratch(torch.device("cpu"), tmp_path, lambda kind: "disk")
    key = layer_input(0, 1)
    for size in (3, 7, 2):
        scratch[key] = torch.full((size,), float(size))
        assert scratch[key].tolist() == [size] * size
        scratch.drop(key)
        assert not (tmp_path / "input" / "0" / "1").exists()
