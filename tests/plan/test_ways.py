"""Ways: their words, their settings in a plan, and the list of distinct ways."""

from __future__ import annotations

from typing import Any

import pytest

from talik.plan.ways import LEAST_CHUNK, Way, way_of, ways_of
from talik.recipe.plan import Plan


def plan(**changes: Any) -> Plan:
    fields = {"device": "cpu", "threads": 1, "cut": 2, "layers": 4, "trunk": "resident", "top": "resident"}
    fields |= {"cache": "disk", "trunk_batch_tokens": 2048, "hidden_bytes": 1 << 30, "loss_chunk": 256}
    return Plan.model_validate({**fields, "micro_batch_tokens": 2048, "recompute": False, **changes})


@pytest.mark.parametrize(
    ("way", "words", "settings"),
    [
        (
            Way(recompute=False, micro_batch_tokens=2048),
            "micro-batches of 2,048 tokens",
            {"recompute": False, "micro_batch_tokens": 2048},
        ),
        (
            Way(state="ram", micro_batch_tokens=512),
            "micro-batches of 512 tokens, layers recomputed in the backward, optimizer state in host RAM",
            {"recompute": True, "state": "ram", "micro_batch_tokens": 512},
        ),
        (
            Way(top="streamed", state="disk", inputs="disk", micro_batch_tokens=256, loss_chunk=128),
            "micro-batches of 256 tokens, trained layers streamed from a working copy, "
            "optimizer state and layer inputs on disk, loss chunks of 128",
            {
                "top": "streamed",
                "recompute": True,
                "state": "disk",
                "inputs": "disk",
                "micro_batch_tokens": 256,
                "loss_chunk": 128,
            },
        ),
    ],
)
def test_a_way_in_words_and_in_json(way: Way, words: str, settings: dict[str, Any]) -> None:
    assert str(way) == words
    assert way.as_dict() == settings and list(way.as_dict()) == list(settings)


def test_a_way_changes_only_its_own_settings_of_a_plan() -> None:
    way = Way(top="streamed", state="disk", inputs="disk", micro_batch_tokens=512)
    changed = way.apply(plan())
    assert changed == plan(**way.as_dict())
    assert (changed.loss_chunk, changed.hidden_bytes) == (256, 1 << 30)
    assert way_of(changed) == Way(
        top="streamed", state="disk", inputs="disk", micro_batch_tokens=512, loss_chunk=256
    )


def test_ways_with_the_same_micro_batches_are_tried_once() -> None:
    """The longest example limits micro-batches from below; the first of several equal ways is kept."""
    short, long = (ways_of(plan(), longest) for longest in (100, 1500))
    assert [way.micro_batch_tokens for way in short if way.top == "resident"] == [*[2048, 1024, 512] * 2, 256]
    assert [way.micro_batch_tokens for way in long if way.top == "resident"] == [*[2048, 1024] * 2, 256]
    assert len(set(short)) == len(short)


def test_loss_chunks_are_never_made_larger() -> None:
    for chunk in (64, 256):
        chunks = {way.loss_chunk for way in ways_of(plan(loss_chunk=chunk), 100)}
        assert chunks == {None, min(chunk, LEAST_CHUNK)}


def test_host_ram_is_used_only_by_a_device_with_its_own_memory() -> None:
    assert not any(way.state == "ram" for way in ways_of(plan(), 100))
    assert any(way.state == "ram" for way in ways_of(plan(device="cuda"), 100))
    assert all(way.top == "resident" for way in ways_of(plan(), 100, streamed=False))
