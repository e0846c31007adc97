"""The trunk's cache: what comes out is what went in, and damage is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import freeze_top, make_examples, make_plan, make_recipe
from talik.data.labels import Example
from talik.errors import NoRoomError
from talik.events import Said, silent
from talik.train.cache import cache_key
from talik.train.trunk import run_trunk, trunk_cache


def test_cached_states_are_those_of_the_trunk(
    build_model: Callable[..., Any], examples: list[Example], tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        top = freeze_top(build_model("qwen2", dtype=dtype))
        with trunk_cache(top, examples, make_recipe(cache=str(tmp_path)), make_plan(top), silent) as cache:
            read = cache.read([5, 0, 3])
        assert read.dtype == dtype and read.shape[:2] == (3, 20)
        for row, index in zip(read, (5, 0, 3), strict=True):
            length = examples[index].length
            alone = run_trunk(top.chain, top.cut, torch.tensor([list(examples[index].input_ids)]))
            assert torch.equal(row[:length], alone[0]) and not row[length:].any()


def test_a_residual_in_fp32_is_cached_in_fp32(
    build_model: Callable[..., Any], examples: list[Example], tmp_path: Path
) -> None:
    """A bf16 Mamba 2 hands on fp32 hidden states: laid out for bf16, each would overwrite the next."""
    sizes = {"num_heads": 8, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 16}
    top = freeze_top(build_model("mamba2", dtype=torch.bfloat16, **sizes))
    with trunk_cache(top, examples, make_recipe(cache=str(tmp_path)), make_plan(top), silent) as cache:
        for index, example in enumerate(examples):
            alone = run_trunk(top.chain, top.cut, torch.tensor([list(example.input_ids)]))
            assert alone.dtype == torch.float32 and torch.equal(cache.read([index]), alone)


def test_key_covers_tokens_weights_cut_and_order(
    build_model: Callable[..., Any], examples: list[Example]
) -> None:
    model = build_model("qwen2")
    top = freeze_top(model)
    plan = make_plan(top)
    key = cache_key(top.chain, 2, examples, plan)
    assert key == cache_key(top.chain, 2, examples, plan)
    others = [
        cache_key(top.chain, 1, examples, plan),
        cache_key(top.chain, 2, examples[::-1], plan),
        cache_key(top.chain, 2, make_examples(seed=1), plan),
        cache_key(top.chain, 2, examples, make_plan(top, trunk_batch_tokens=128)),
        cache_key(top.chain, 2, examples, make_plan(top, threads=2)),
    ]
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] += 1  # above the cut: the same trunk
        assert key == cache_key(top.chain, 2, examples, plan)
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
        others.append(cache_key(top.chain, 2, examples, plan))
    assert len({key, *others}) == 7


def test_a_flipped_bit_is_found_and_the_trunk_runs_again(
    build_model: Callable[..., Any], examples: list[Example], tmp_path: Path
) -> None:
    top = freeze_top(build_model("qwen2"))
    arguments = (top, examples, make_recipe(cache=str(tmp_path)), make_plan(top))
    with trunk_cache(*arguments, silent) as cache:
        expected = cache.read([0])
    said: list[Any] = []
    with trunk_cache(*arguments, said.append):
        pass
    assert any(isinstance(event, Said) and "in the cache already" in event.text for event in said)
    (file,) = tmp_path.glob("*/hidden.bin")
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with trunk_cache(*arguments, silent) as cache:
        assert torch.equal(cache.read([0]), expected)


def test_nothing_stays_of_a_pass_that_was_broken_off(
    build_model: Callable[..., Any], examples: list[Example], tmp_path: Path
) -> None:
    top = freeze_top(build_model("qwen2"))

    def stop(event: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trunk_cache(top, examples, make_recipe(cache=str(tmp_path)), make_plan(top), stop)
    assert all(path.suffix == ".lock" for path in tmp_path.iterdir())


def test_no_room(
    build_model: Callable[..., Any],
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    top = freeze_top(build_model("qwen2"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        NoRoomError, match=r"the trunk.s cache: 9\.2 KiB are needed, and the disk has 1000 B free"
    ):
        trunk_cache(top, examples, make_recipe(cache=str(tmp_path)), make_plan(top), silent)
