"""Keys of the scratch, and their text in files."""

from __future__ import annotations

import pytest

from talik.training.memory.keys import NORM, Key, gradient, layer_input, layer_of_input, master, pending


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (NORM, "norm"),
        (gradient("a.weight"), "gradient/a.weight"),
        (pending("a.weight"), "pending/a.weight"),
        (master("a.weight"), "master/a.weight"),
        (layer_input(12, 3), "input/12/3"),
        (Key("exp_avg", "a.weight"), "exp_avg/a.weight"),
    ],
)
def test_a_key_is_read_from_its_text(key: Key, text: str) -> None:
    assert str(key) == text and Key.parse(text) == key


def test_only_a_layer_input_has_a_layer() -> None:
    assert layer_of_input(layer_input(12, 3)) == 12
    assert layer_of_input(gradient("layers.4.weight")) is None
