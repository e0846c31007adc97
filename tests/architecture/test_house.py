"""The house rules that a machine can check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import talik
from talik.recipe.recipe import Recipe
from talik.recipe.recipe_file import options_table

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_show_prints(path: Path) -> None:
    """The command line prints its own help before anything is imported."""
    if path.name in ("show.py", "main.py"):
        return
    calls = (
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_every_field_of_the_recipe_has_help_and_stands_in_the_docs(request: pytest.FixtureRequest) -> None:
    page = ROOT / "docs" / "recipe.md"
    if request.config.getoption("--update-golden"):
        page.write_text(options_table(), encoding="utf-8")
    assert all(field.description for field in Recipe.model_fields.values())
    assert page.read_text(encoding="utf-8") == options_table()
