"""Options of commands: their own, and those derived from the recipe's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from pydantic import TypeAdapter, ValidationError

from talik.base.errors import UsageError, numbered_list
from talik.recipe.aliases import EXPLAINED, options_of
from talik.recipe.recipe import Recipe

ENFORCE = "make the planned memory a hard limit: the run ends with a diagnosis if it needs more"
DATA_HELP = "rows: files, folders, globs, -, hf:ORG/NAME, modelscope:ORG/NAME"
DATA_FIELDS = (
    *("input_field", "output_field", "format", "bad_rows", "drop_media", "control_tokens"),
    *("train_on", "train_reasoning", "max_length", "too_long"),
)


def parse(command: str, options: type, argv: list[str], description: str) -> Any:
    """Parses the options of a command. tyro prints help and mistakes, and exits. `data` becomes a list."""
    _explain_unknown(argv)
    parsed = tyro.cli(options, args=argv, prog=f"talik {command}", description=description, add_help=True)
    if hasattr(parsed, "more_data"):
        first = parsed.data if isinstance(parsed.data, list) else [parsed.data] if parsed.data else []
        parsed.data = [*first, *parsed.more_data]
        del parsed.more_data
    return parsed


def _explain_unknown(argv: list[str]) -> None:
    """Raises UsageError for options of Transformers that have no counterpart in a recipe."""
    wrong = [f"--{name.replace('_', '-')}: {why}" for name, why in EXPLAINED.items() if name in typed(argv)]
    if wrong:
        raise UsageError(numbered_list(wrong))


def typed(argv: Sequence[str]) -> set[str]:
    """The named options on a command line, with underscores."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word[:2] == "--"}


def check_two_ways(argv: Sequence[str], top_layers: Any) -> None:
    """Raises UsageError for --thaw with the default of --top-layers; a recipe reports other numbers."""
    silent = ("auto", Recipe.model_fields["top_layers"].default)
    if {"thaw", "top_layers"} <= typed(argv) and top_layers in silent:
        raise UsageError("--top-layers and --thaw are two ways to say what is trained: name one")


def arg(kind: Any, help: str, *aliases: str, name: str | None = None) -> Any:
    """The annotation of a named option."""
    return Annotated[kind, tyro.conf.arg(name=name, help=help, aliases=list(aliases) or None)]


def positional(kind: Any, help: str, metavar: str) -> Any:
    """The annotation of a positional option."""
    return Annotated[kind, tyro.conf.Positional, tyro.conf.arg(help=help, metavar=metavar)]


MORE_DATA = ("more_data", positional(list[str], "more rows, named in the same ways", "[DATA ...]"), [])


def options(name: str, *fields: tuple[str, Any] | tuple[str, Any, Any]) -> type:
    """Makes a dataclass of options from (name, type) or (name, type, default); required ones come first."""
    made = [
        (field[0], field[1], dataclasses.field(default_factory=lambda value=field[2]: value))
        if len(field) == 3
        else field
        for field in sorted(fields, key=len)
    ]
    return dataclasses.make_dataclass(name, made)


def recipe_fields(names: Sequence[str] | None = None, **shown: Any) -> list[Any]:
    """Options for fields of the Recipe, with their help; defaults are replaced by the `shown` values."""
    fields: list[Any] = []
    for name, field in Recipe.model_fields.items():
        if names is not None and name not in names:
            continue
        help = field.description or ""
        if not field.is_required():
            default = shown.get(name, field.get_default(call_default_factory=True))
            kind = list[str] | None if name == "eval_data" else field.annotation
            fields.append((name, arg(kind, help, *options_of(name)), default))
        else:
            kind: Any = str | None if name in shown else str
            default = (shown[name],) if name in shown else ()
            fields.append((name, positional(kind, help, name.upper()), *default))
            if name == "data":
                fields.append(MORE_DATA)
    return fields


def optional(kind: Any) -> Any:
    """The annotation of an option that may be omitted."""
    inner, *metadata = kind.__origin__, *kind.__metadata__
    return Annotated[inner | None, *metadata]


def fits(name: str, value: Any) -> bool:
    """True if a value may be shown as the default of a field."""
    try:
        read_as(name, value)
    except (KeyError, ValidationError):
        return False
    return True


def read_as(name: str, value: Any) -> Any:
    """Converts a value of a recipe.yaml to the field's type: YAML 1.1 reads 1e-5 as a string."""
    kind: Any = Recipe.model_fields[name].annotation
    return TypeAdapter(kind).validate_python(value)


def quiet() -> None:
    """Turns off the progress bars of Transformers, which would break those of Talik."""
    from transformers.utils import logging

    logging.disable_progress_bar()
