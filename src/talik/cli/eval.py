"""`talik eval`: loss, perplexity and token accuracy of a run or a model."""

from __future__ import annotations

from talik.cli.options import (
    DATA_FIELDS,
    MORE_DATA,
    arg,
    optional,
    options,
    parse,
    positional,
    quiet,
    recipe_fields,
)
from talik.cli.show import console


def command(argv: list[str]) -> None:
    unset = {name: None for name in DATA_FIELDS}
    fields = [(name, optional(kind), default) for name, kind, default in recipe_fields(DATA_FIELDS, **unset)]
    wanted = options(
        "Eval",
        ("target", positional(str, "folder of a run, or a model", "RUN|MODEL")),
        ("data", positional(str, "rows: a file, a folder, hf:ORG/NAME, ...", "DATA")),
        MORE_DATA,
        *fields,
        ("json", arg(bool, "print the result as JSON"), False),
    )
    parsed = vars(parse("eval", wanted, argv, "Loss per trained token, perplexity and token accuracy."))
    given = {name: parsed[name] for name in DATA_FIELDS if parsed[name] is not None}
    from talik.cli.show import tables
    from talik.cli.show.watch import Watch
    from talik.evaluation import evaluate

    quiet()
    with Watch() as watch:
        report = evaluate(parsed["target"], parsed["data"], notify=watch, **given)
    if parsed["json"]:
        console.result_json(report)
        return
    marks = [(name, report[name]) for name in ("model", "base", "tuned") if name in report]
    for source, parts in report.get("by_source", {}).items():
        marks += [(f"{name}, {source}", mark) for name, mark in parts.items()]
    console.result(f"{report['examples']:,} examples, {report['trained_tokens']:,} trained tokens")
    console.result(tables.comparison(marks))
