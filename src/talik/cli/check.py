"""`talik check`: every problem of a data set."""

from __future__ import annotations

from pathlib import Path

from talik.base.errors import DataProblemsError
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
    fields = (*DATA_FIELDS, "eval_data", "held_out", "seed")
    wanted = options(
        "Check",
        ("data", positional(str, DATA_HELP, "DATA")),
        MORE_DATA,
        ("model", arg(str, "the model whose tokenizer and chat template are used")),
        ("html", arg(str | None, "write a page to this file, too"), None),
        ("json", arg(bool, "print it as JSON"), False),
        ("no_plan", arg(bool, "do not plan the time and memory of a run"), False),
        *recipe_fields(fields),
    )
    parsed = vars(parse("check", wanted, argv, "Every problem of a data set, with file and line."))
    from talik.check.checker import check_rows
    from talik.check.plan_summary import plan_lines
    from talik.check.report_html import check_page
    from talik.check.report_text import check_text, summary
    from talik.cli.show.watch import Watch
    from talik.model.folder import open_model

    quiet()
    recipe = checked_recipe({"model": parsed["model"], **{name: parsed[name] for name in ("data", *fields)}})
    model = open_model(parsed["model"], weights=False)
    tokenizer = model.tokenizer()
    with Watch() as watch:
        found = check_rows(recipe, tokenizer, watch)
        if not parsed["no_plan"]:
            found.plan = plan_lines(found.statistics, recipe, model, watch)
    console.result_json(found.as_dict()) if parsed["json"] else console.result(check_text(found))
    if parsed["html"]:
        write_text(Path(parsed["html"]), check_page(found, ", ".join(parsed["data"]), tokenizer))
        console.said("written", parsed["html"])
    if found.problems:
        raise DataProblemsError(summary(found))
