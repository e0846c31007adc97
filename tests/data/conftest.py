from __future__ import annotations

from typing import Any

import pytest

from helpers.small_tokenizers import make_tokenizer


@pytest.fixture(scope="session")
def chatml() -> Any:
    return make_tokenizer("chatml")
