"""FileStore: blocks are real after `get` and hollow after `release`; all streamed ones share two buffers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch

from talik.base.errors import SourceError
from talik.model.block import EMBEDDINGS, TAIL, Block
from talik.model.weights.hollow import hollow_model
from talik.model.weights.weights import Weights
from talik.model.weights.working_copy import WorkingCopy
from talik.training.memory.store import FileStore, Residency

LAYERS = [Block.layer(i) for i in range(4)]


def open_store(
    model: Any, folder: Path, streamed: list[Block], executor: Executor | None = None
) -> tuple[Any, Weights, FileStore]:
    model.save_pretrained(folder)
    hollow = hollow_model(folder, model.dtype)
    weights = Weights(hollow, folder)
    return hollow, weights, FileStore(weights, torch.device("cpu"), streamed, executor)


class SteppedExecutor(Executor):
    """Runs one piece of submitted work whenever `step` is called."""

    def __init__(self) -> None:
        self.queue: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.queue.append((future, lambda: fn(*args, **kwargs)))
        return future

    def step(self) -> None:
        future, work = self.queue.pop(0)
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)


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


def test_a_streamed_block_goes_through_its_states(build_model: Callable[..., Any], tmp_path: Path) -> None:
    executor = SteppedExecutor()
    hollow, weights, store = open_store(build_model("qwen2"), tmp_path, LAYERS, executor)
    first, name = LAYERS[0], weights.names(LAYERS[0])[0]
    assert store.residency(first) == Residency.AWAY
    store.read_ahead(first)
    store.read_ahead(first)  # a no-op while it is being read
    assert store.residency(first) == Residency.READING and len(executor.queue) == 1
    executor.step()
    assert store.residency(first) == Residency.READING and hollow.get_parameter(name).is_meta
    store.get(first)
    assert store.residency(first) == Residency.LOADED and not hollow.get_parameter(name).is_meta
    store.get(first)
    store.read_ahead(first)
    assert executor.queue == []  # both are no-ops while it is loaded
    store.release(first)
    assert store.residency(first) == Residency.AWAY and hollow.get_parameter(name).is_meta
    store.release(first)  # a no-op
    assert store.residency(first) == Residency.AWAY


def test_another_block_is_loaded_until_it_is_released(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    hollow, _, store = open_store(build_model("qwen2"), tmp_path, LAYERS)
    store.read_ahead(TAIL)  # only streamed blocks are read ahead
    assert store.residency(TAIL) == Residency.AWAY
    store.get(TAIL)
    assert store.residency(TAIL) == Residency.LOADED and not hollow.model.norm.weight.is_meta
    store.drop_buffers()  # concerns streamed blocks only
    assert store.residency(TAIL) == Residency.LOADED
    store.release(TAIL)
    assert store.residency(TAIL) == Residency.AWAY and hollow.model.norm.weight.is_meta


def test_dropping_buffers_waits_for_a_block_that_is_being_read(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    hollow, weights, store = open_store(build_model("qwen2"), tmp_path, LAYERS)
    store.get(LAYERS[0])
    store.read_ahead(LAYERS[1])
    store.drop_buffers()
    assert [store.residency(layer) for layer in LAYERS[:2]] == [Residency.AWAY] * 2
    assert store.traffic.bytes == 2 * weights.bytes_in_files(weights.names(LAYERS[0]))
    assert all(parameter.is_meta for parameter in hollow.parameters())


def test_tied_blocks_are_read_once_and_stay_while_one_is_used(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = build_model("qwen2", tie_word_embeddings=True)
    hollow, weights, store = open_store(model, tmp_path, [])
    store.get(EMBEDDINGS)
    before = store.traffic.bytes
    store.get(TAIL)
    assert store.traffic.bytes - before == weights.bytes_in_files(["model.norm.weight"])
    assert hollow.lm_head.weight is hollow.model.embed_tokens.weight
    store.release(EMBEDDINGS)
    assert hollow.model.embed_tokens.weight.is_meta
    assert torch.equal(hollow.lm_head.weight, model.lm_head.weight)
    before = store.traffic.bytes
    store.get(EMBEDDINGS)
    assert store.traffic.bytes == before and hollow.lm_head.weight is hollow.model.embed_tokens.weight
    store.release(EMBEDDINGS)
    store.release(TAIL)
    assert hollow.lm_head.weight is hollow.model.embed_tokens.weight and hollow.lm_head.weight.is_meta


@pytest.mark.parametrize("before", [Residency.AWAY, Residency.READING, Residency.LOADED])
def test_a_pinned_block_is_neither_released_nor_streamed(
    build_model: Callable[..., Any], tmp_path: Path, before: Residency
) -> None:
    model = build_model("qwen2")
    hollow, weights, store = open_store(model, tmp_path, LAYERS)
    name = weights.names(LAYERS[3])[0]
    hollow.get_parameter(name).requires_grad = False
    if before == Residency.READING:
        store.read_ahead(LAYERS[3])
    elif before == Residency.LOADED:
        store.get(LAYERS[3])
    assert store.residency(LAYERS[3]) == before
    store.pin(LAYERS[3])
    parameter = hollow.get_parameter(name)
    store.read_ahead(LAYERS[3])
    store.get(LAYERS[3])
    store.put(LAYERS[3])
    store.release(LAYERS[3])
    for layer in LAYERS[:2]:  # a pinned block takes none of the two buffers
        store.get(layer)
    store.drop_buffers()
    assert store.residency(LAYERS[3]) == Residency.PINNED and store.traffic.written == 0
    assert hollow.get_parameter(name) is parameter and not parameter.requires_grad
    assert torch.equal(parameter, model.get_parameter(name))


def test_an_error_while_reading_ahead_is_raised_by_get(
    build_model: Callable[..., Any], tmp_path: Path
) -> None:
    _, _, store = open_store(build_model("qwen2"), tmp_path, LAYERS)
    store.get(LAYERS[0])
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    store.read_ahead(LAYERS[1])
    for _ in range(2):  # the block is not taken for loaded afterwards
        with pytest.raises(SourceError, match=r"has changed since .* holds \S+ and others"):
            store.get(LAYERS[1])
        assert store.residency(LAYERS[1]) == Residency.AWAY


def test_an_error_while_writing_is_raised_by_the_next_get(
    build_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights, store = open_store(build_model("qwen2"), tmp_path, LAYERS)
    names = weights.names(LAYERS[0])
    copy = WorkingCopy(tmp_path / "copy", {name: weights.hollow(name).nbytes for name in names})
    weights.changed = copy
    store.get(LAYERS[0])
    with monkeypatch.context() as patch:
        patch.setattr(copy, "write", lambda name, tensor: (_ for _ in ()).throw(OSError("disk")))
        store.put(LAYERS[0])
        store.release(LAYERS[0])
        with pytest.raises(OSError, match="disk"):
            store.drop_buffers()
    copy.close()


def test_a_third_block_waits_for_a_buffer(build_model: Callable[..., Any], tmp_path: Path) -> None:
    hollow, weights, store = open_store(build_model("qwen2"), tmp_path, LAYERS)
    store.get(LAYERS[0])
    store.read_ahead(LAYERS[1])
    store.read_ahead(LAYERS[2])  # no buffer is free: `get` begins to read once one is
    assert store.residency(LAYERS[2]) == Residency.AWAY
    store.release(LAYERS[0])
    store.get(LAYERS[2])
    assert not hollow.get_parameter(weights.names(LAYERS[2])[0]).is_meta
