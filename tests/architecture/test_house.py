"""The house rules that a machine can check."""

from __future__ import annotations

from pathlib import Path

import pytest

import talik
from talik.recipe.recipe import Recipe
from talik.recipe.recipe_file import options_table

ROOT = Path(__file__).parents[2]


def test_the_public_names() -> None:
    assert talik.__all__ == [
        "Chain",
        "Plan",
        "Recipe",
        "TalikError",
        "chunked_loss",
        "collate",
        "drop_in",
        "evaluate",
        "explain",
        "export",
        "freeze",
        "inspect_model",
        "preview",
        "read_data",
        "resume",
        "train",
        "verify_chain",
    ]
    assert all(getattr(talik, name).__doc__ for name in talik.__all__)


def test_no_module_bears_the_name_of_a_public_function() -> None:
    modules = {path.stem for path in (ROOT / "src" / "talik").iterdir()}
    assert not modules & set(talik.__all__)


def test_every_field_of_the_recipe_has_help_and_stands_in_the_docs(request: pytest.FixtureRequest) -> None:
    page = ROOT / "docs" / "recipe.md"
    if request.config.getoption("--update-golden"):
        page.write_text(options_table(), encoding="utf-8")
    assert all(field.description for field in Recipe.model_fields.values())
    assert page.read_text(encoding="utf-8") == options_table()
