"""Blocks from files: real after `get`, hollow after `release`, in two buffers however many there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from talik.base.errors import SourceError
from talik.model.weights.hollow import hollow_model
from talik.model.weights.weights import Weights
from talik.training.memory.store import FileStore

LAYERS = [f"layer {i}" for i in range(4)]


def open_store(model: Any, folder: Path, streamed: list[str]) -> tuple[Any, Weights, FileStore]:
    model.save_pretrained(folder)
    hollow = hollow_model(folder, model.dtype)
    weights = Weights(hollow, folder)
    return hollow, weights, FileStore(weights, torch.device("cpu"), streamed)


def test_streamed_blocks_take_turns_in_two_buffers(build_model: Callable[..., Any], tmp_path: Path) -> None:
    model = build_model("qwen2", tie_word_embeddings=False)
    hollow, weights, store = open_store(model, tmp_path, LAYERS)
    places = set()
    for index, layer in enumerate(LAYERS * 2):
        store.get(layer)
        store.read_ahead(LAYERS[(index + 1) % 4])
        for name in weights.names(layer):
            assert torch.equal(hollow.get_parameter(name), model.get_parameter(name))
        places.add(hollow.get_parameter(weights.names(layer)[0]).data_ptr())
        store.release(layer)
        assert all(hollow.get_parameter(name).is_meta for name in weights.names(layer))
    assert len(places) == 2
    store.drop_buffers()
    assert store.traffic.bytes == (2 * 4 + 1) * weights.bytes_in_files(weights.names(LAYERS[0]))
    assert all(parameter.is_meta for parameter in hollow.parameters())


def test_tied_blocks_are_read_once_and_stay_while_one_is_used(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = build_model("qwen2", tie_word_embeddings=True)
    hollow, weights, store = open_store(model, tmp_path, [])
    store.get("embeddings")
    before = store.traffic.bytes
    store.get("tail")
    assert store.traffic.bytes - before == weights.bytes_in_files(["model.norm.weight"])
    assert hollow.lm_head.weight is hollow.model.embed_tokens.weight
    store.release("embeddings")
    assert hollow.model.embed_tokens.weight.is_meta
    assert torch.equal(hollow.lm_head.weight, model.lm_head.weight)
    store.release("tail")
    assert hollow.lm_head.weight is hollow.model.embed_tokens.weight and hollow.lm_head.weight.is_meta


def test_what_stays_is_not_released_nor_streamed(build_model: Callable[..., Any], tmp_path: Path) -> None:
    model = build_model("qwen2")
    hollow, weights, store = open_store(model, tmp_path, LAYERS)
    name = weights.names("layer 3")[0]
    hollow.get_parameter(name).requires_grad = False
    store.stay("layer 3")
    parameter = hollow.get_parameter(name)
    store.read_ahead("layer 3")
    store.get("layer 3")
    store.release("layer 3")
    assert hollow.get_parameter(name) is parameter and not parameter.requires_grad
    assert torch.equal(parameter, model.get_parameter(name))


def test_what_goes_wrong_while_reading_ahead_is_raised_by_get(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    _, _, store = open_store(build_model("qwen2"), tmp_path, LAYERS)
    store.get("layer 0")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    store.read_ahead("layer 1")
    with pytest.raises(SourceError, match=r"has changed since .* holds \S+ and others"):
        store.get("layer 1")


def test_more_than_two_at_once_wait_for_a_buffer(build_model: Callable[..., Any], tmp_path: Path) -> None:
    hollow, weights, store = open_store(build_model("qwen2"), tmp_path, LAYERS)
    store.get("layer 0")
    store.read_ahead("layer 1")
    store.read_ahead("layer 2")  # no buffer is free: `get` begins to read once one is
    store.release("layer 0")
    store.get("layer 2")
    assert not hollow.get_parameter(weights.names("layer 2")[0]).is_meta
