"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from helpers.training import freeze_top, make_examples
from talik.data.examples import Example
from talik.training.step.top import Top


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return make_examples()


@pytest.fixture(scope="session")
def top_of() -> Callable[..., Top]:
    return freeze_top
