"""`talik preview`: which tokens of examples are trained and which are masked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from talik.base.files import write_text
from talik.cli.options import (
    DATA_FIELDS,
    DATA_HELP,
    MORE_DATA,
    arg,
    options,
    parse,
    positional,
    quiet,
    recipe_fields,
)
from talik.cli.show import console
from talik.recipe.recipe import checked_recipe


def command(argv: list[str]) -> None:
    wanted = options(
        "Preview",
        ("data", positional(str, DATA_HELP, "DATA")),
        MORE_DATA,
        ("model", arg(str, "the model whose tokenizer and chat template are used")),
        ("count", arg(int, "how many examples; 0 for the counts alone", "-n"), 3),
        ("html", arg(str | None, "write a page to this file, too"), None),
        *recipe_fields(DATA_FIELDS),
    )
    parsed = vars(parse("preview", wanted, argv, "Shows every token of examples, trained or masked."))
    from talik.cli.show.data import data_lines, template_lines
    from talik.cli.show.watch import Watch
    from talik.data.dataset import preview, read_all
    from talik.data.preview import preview_html
    from talik.model.source.source import find_model
    from talik.model.tokenizer import load_tokenizer

    quiet()
    load = partial(load_tokenizer, find_model(parsed["model"], weights=False).folder)
    tokenizer = load()
    with Watch() as watch:
        recipe = checked_recipe(
            {"model": parsed["model"], **{name: parsed[name] for name in ("data", *DATA_FIELDS)}}
        )
        data = read_all(recipe, recipe.data, tokenizer, "reading", load=load, notify=watch)
    for line in (*data_lines(data), *template_lines(data.report)):
        console.said("data", line)
    for part in preview(data, tokenizer, max(parsed["count"], 0)):
        console.result(part)
    if parsed["html"]:
        write_text(Path(parsed["html"]), preview_html(data.examples[: max(parsed["count"], 0)], tokenizer))
        console.said("written", parsed["html"])
