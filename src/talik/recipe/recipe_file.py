"""Reads and writes recipe.yaml, and writes docs/recipe.md from the same fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml

from talik.base.errors import RecipeError
from talik.base.files import write_text
from talik.recipe.aliases import ALIASES, own_names
from talik.recipe.recipe import Recipe

_AS_YAML = "Write one `field: value` a line, in UTF-8."


class _Once(yaml.SafeLoader):
    """A YAML loader that runs no code and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key.value, str):
                problem = f"the key {key.value[:60]!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else str(id(key)))
        return super().construct_mapping(node, deep)


def read_fields(path: Path) -> dict[str, Any]:
    """Reads the fields of a recipe.yaml, unchecked, by the recipe's own names.

    Raises:
        RecipeError: The file is missing or is not YAML.
    """
    if not path.is_file():
        raise RecipeError("there is no such recipe file", where=path.absolute())
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else path
        raise RecipeError(f"is not YAML: {error.problem}", where=where, remedy=_AS_YAML) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RecipeError(f"is not YAML in UTF-8: {error}", where=path, remedy=_AS_YAML) from None
    if not isinstance(fields, dict):
        raise RecipeError("holds no fields", where=path, remedy=_AS_YAML)
    named = cast(dict[Any, Any], fields)
    return own_names({str(name): value for name, value in named.items()})


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes every field, defaults included, as YAML."""
    write_text(path, yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True))


def options_table() -> str:
    """The text of docs/recipe.md: every field with its help and its default."""
    rows = [
        "| field | default | what it does |\n|---|---|---|\n",
        *(
            f"| `{name}` | {'' if field.is_required() else f'`{field.default}`'} | {field.description} |\n"
            for name, field in Recipe.model_fields.items()
        ),
    ]
    head = (
        "# The recipe\n\nEvery field is an option of `talik train` (`top_layers` is `--top-layers`) and a "
        "line of recipe.yaml (`talik train -c recipe.yaml`). This page is written from the code.\n\n"
    )
    tail = (
        "\nNames of Transformers' TrainingArguments that are accepted:\n\n| name | field |\n|---|---|\n"
        + "".join(f"| `{name}` | `{field}` |\n" for name, field in ALIASES.items())
    )
    return head + "".join(rows) + tail
