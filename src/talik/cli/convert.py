"""`talik convert`: any data format as JSON lines of messages."""

from __future__ import annotations

from pathlib import Path

from talik.base.errors import UsageError
from talik.cli.options import (
    DATA_HELP,
    options,
    parse,
    positional,
    recipe_fields,
)
from talik.cli.show import console
from talik.recipe.recipe import checked_recipe


def command(argv: list[str]) -> None:
    fields = ("input_field", "output_field", "format", "bad_rows", "drop_media")
    wanted = options(
        "Convert",
        ("data", positional(str, DATA_HELP, "DATA")),
        ("more_data", positional(list[str], "more rows; last the file to write", "[DATA ...] OUT.jsonl")),
        *recipe_fields(fields),
    )
    parsed = vars(parse("convert", wanted, argv, "Writes any data format as JSON lines of messages."))
    from talik.cli.show.watch import Watch
    from talik.data.convert import convert

    *data, out = parsed["data"]
    if not data:
        raise UsageError("name the data and the file to write", remedy="talik convert DATA OUT.jsonl")
    recipe = checked_recipe({"model": "-", "data": data, **{name: parsed[name] for name in fields}})
    with Watch() as watch:
        done = convert(recipe, Path(out), watch)
    rows = (
        "1 row cannot be used and is"
        if done.left_out == 1
        else f"{done.left_out:,} rows cannot be used and are"
    )
    left = f"; {rows} left out" if done.left_out else ""
    console.result(f"{out}: {done.rows:,} rows{left}")
