"""`talik train`: trains the top of a model into a new run folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from talik.base.errors import UsageError, collect_errors
from talik.base.files import parse_size, quoted
from talik.cli.options import (
    ENFORCE,
    arg,
    check_two_ways,
    fits,
    options,
    parse,
    quiet,
    read_as,
    recipe_fields,
)
from talik.cli.show import console
from talik.recipe.plan import read_plan
from talik.recipe.recipe import Recipe, checked_recipe
from talik.recipe.recipe_file import read_fields


def command(argv: list[str]) -> None:
    """Command line over recipe.yaml over defaults; all mistakes are reported at once."""

    first = argparse.ArgumentParser("talik train", add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config")
    config = first.parse_known_args(argv)[0].config
    written = read_fields(Path(config)) if config else {}
    shown = {key: read_as(key, value) for key, value in written.items() if fits(key, value)}
    if config:  # MODEL and DATA stay positional, whichever of them the file names
        shown = {"model": None, "data": None, **shown}
    help_config = "a recipe.yaml whose fields stand in for the defaults"
    wanted = options(
        "Train",
        *recipe_fields(**shown),
        ("run", arg(str, "folder of the run; must be new", "-o", name="output")),
        ("config", arg(str | None, help_config, "-c"), None),
        ("plan", arg(str | None, "the plan.json of another run, to be used again"), None),
        ("memory", arg(str | None, "memory the run may take, as in 8GiB; default: what is free"), None),
        ("enforce", arg(bool, ENFORCE), False),
        ("json", arg(bool, "print the result as JSON"), False),
    )
    parsed = vars(parse("train", wanted, argv, "Trains the top of a model on a file of rows."))
    run, as_json, plan, memory, enforce = (
        parsed.pop(name) for name in ("run", "json", "plan", "memory", "enforce")
    )
    del parsed["config"]
    defaults = {name: field.default for name, field in Recipe.model_fields.items()} | shown
    given = {name: value for name, value in parsed.items() if name not in defaults or value != defaults[name]}
    given = {name: value for name, value in given.items() if (name, value) != ("data", [])}
    recipe, limits, _ = collect_errors(
        lambda: checked_recipe({**written, **given}, config),
        lambda: _limits(plan, memory),
        lambda: check_two_ways(argv, parsed["top_layers"]),
    )

    from talik.cli.show.watch import Watch
    from talik.run import train

    quiet()
    _show_recipe(recipe)
    with Watch() as watch:
        result = train(recipe, run, **limits, enforce=enforce, notify=watch)
    show_result(result, as_json)


def _limits(plan: str | None, memory: str | None) -> dict[str, Any]:
    """The plan to carry out, or the memory the run may take."""

    if plan and memory:
        raise UsageError("--plan and --memory: a plan has its own memory; name one")
    return {
        "plan": read_plan(Path(plan)) if plan else None,
        "memory": parse_size(memory, "--memory") if memory else None,
    }


def _show_recipe(recipe: Any) -> None:

    shown = [f"{name} {value}" for name, value in recipe.model_dump().items() if value not in (None, [])]
    console.said("recipe", "; ".join(shown))


def show_result(result: Any, as_json: bool) -> None:
    """Prints the result of a run, for people or as JSON."""
    from talik.cli.show import tables

    if as_json:
        console.result_json(result.as_dict())
        return
    console.result(f"{result.steps} steps in {result.seconds:.0f} s; the run is in {result.run}")
    if result.base and result.tuned:
        rows = [("base", result.base.measures()), ("tuned", result.tuned.measures())]
        for source, marks in result.by_source.items():
            rows += [(f"{name}, {source}", mark.measures()) for name, mark in marks.items()]
        console.result(tables.comparison(rows))
    console.result(tables.memory(result.memory))
    run = quoted(result.run)
    console.result(f"talk to it: talik chat {run}\nexport it:  talik export {run} FOLDER")
