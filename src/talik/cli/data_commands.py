"""The commands that only look at data."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from talik.cli.options import DATA_FIELDS, MORE_DATA, arg, options, parse, positional, quiet, recipe_fields

DATA_HELP = "rows: files, folders, globs, -, hf:ORG/NAME, modelscope:ORG/NAME"


def preview_command(argv: list[str]) -> None:
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
    from talik.base.files import write_text
    from talik.cli import show
    from talik.data.dataset import preview, read_all
    from talik.data.preview import preview_html
    from talik.model.source.source import find_model
    from talik.model.tokenizer import load_tokenizer
    from talik.recipe.recipe import checked_recipe

    quiet()
    load = partial(load_tokenizer, find_model(parsed["model"], weights=False).folder)
    tokenizer = load()
    with show.Watch() as watch:
        recipe = checked_recipe(
            {"model": parsed["model"], **{name: parsed[name] for name in ("data", *DATA_FIELDS)}}
        )
        data = read_all(recipe, recipe.data, tokenizer, "reading", load=load, notify=watch)
    for line in (*show.data_lines(data), *show.template_lines(data.report)):
        show.said("data", line)
    for part in preview(data, tokenizer, max(parsed["count"], 0)):
        show.result(part)
    if parsed["html"]:
        write_text(Path(parsed["html"]), preview_html(data.examples[: max(parsed["count"], 0)], tokenizer))
        show.said("written", parsed["html"])


def check_command(argv: list[str]) -> None:
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
    from talik.base.errors import DataProblemsError
    from talik.base.files import write_text
    from talik.check.checker import check_rows
    from talik.check.page import check_page
    from talik.check.planned import plan_lines
    from talik.check.text import check_text, summary
    from talik.cli import show
    from talik.model.folder import open_model
    from talik.recipe.recipe import checked_recipe

    quiet()
    recipe = checked_recipe({"model": parsed["model"], **{name: parsed[name] for name in ("data", *fields)}})
    model = open_model(parsed["model"], weights=False)
    tokenizer = model.tokenizer()
    with show.Watch() as watch:
        found = check_rows(recipe, tokenizer, watch)
        if not parsed["no_plan"]:
            found.plan = plan_lines(found.statistics, recipe, model, watch)
    show.result_json(found.as_dict()) if parsed["json"] else show.result(check_text(found))
    if parsed["html"]:
        write_text(Path(parsed["html"]), check_page(found, ", ".join(parsed["data"]), tokenizer))
        show.said("written", parsed["html"])
    if found.problems:
        raise DataProblemsError(summary(found))


def convert_command(argv: list[str]) -> None:
    fields = ("input_field", "output_field", "format", "bad_rows", "drop_media")
    wanted = options(
        "Convert",
        ("data", positional(str, DATA_HELP, "DATA")),
        ("more_data", positional(list[str], "more rows; last the file to write", "[DATA ...] OUT.jsonl")),
        *recipe_fields(fields),
    )
    parsed = vars(parse("convert", wanted, argv, "Writes any data format as JSON lines of messages."))
    from talik.base.errors import UsageError
    from talik.cli import show
    from talik.data.convert import convert
    from talik.recipe.recipe import checked_recipe

    *data, out = parsed["data"]
    if not data:
        raise UsageError("name the data and the file to write", remedy="talik convert DATA OUT.jsonl")
    recipe = checked_recipe({"model": "-", "data": data, **{name: parsed[name] for name in fields}})
    with show.Watch() as watch:
        done = convert(recipe, Path(out), watch)
    rows = (
        "1 row cannot be used and is"
        if done.left_out == 1
        else f"{done.left_out:,} rows cannot be used and are"
    )
    left = f"; {rows} left out" if done.left_out else ""
    show.result(f"{out}: {done.rows:,} rows{left}")
