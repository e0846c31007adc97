"""The commands: each parses its options, calls one function, and shows what came of it.

What needs torch or Transformers is imported only after the options are known to be good.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from talik.cli.options import (
    DATA_FIELDS,
    MORE_DATA,
    arg,
    fits,
    optional,
    options,
    parse,
    positional,
    quiet,
    read_as,
    recipe_fields,
)

DATE = "for a chat template that writes today's: a date as 2026-01-31, or `run` for that of the training"
ENFORCE = "make the plan's promise a hard limit: what breaks it ends with the diagnosis"


def train_command(argv: list[str]) -> None:
    """Positional and named options over recipe.yaml over defaults; all wrong ones reported at once."""
    from talik.base.errors import collect_errors
    from talik.recipe.recipe import Recipe, checked_recipe
    from talik.recipe.recipe_file import read_fields

    first = argparse.ArgumentParser("talik train", add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config")
    config = first.parse_known_args(argv)[0].config
    written = read_fields(Path(config)) if config else {}
    shown = {key: read_as(key, value) for key, value in written.items() if fits(key, value)}
    if config:  # MODEL and DATA keep their places, whichever of them the file names
        shown = {"model": None, "data": None, **shown}
    help_config = "a recipe.yaml whose fields stand in for the defaults"
    wanted = options(
        "Train",
        *recipe_fields(**shown),
        ("run", arg(str, "folder of the run; must be new", "-o", name="output")),
        ("config", arg(str | None, help_config, "-c"), None),
        ("plan", arg(str | None, "the plan.json of another run, carried out again"), None),
        ("memory", arg(str | None, "what the run may take, as in 8GiB; default: what is free now"), None),
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
    recipe, limits = collect_errors(
        lambda: checked_recipe({**written, **given}, config), lambda: _limits(plan, memory)
    )

    from talik.cli import show
    from talik.run import train

    quiet()
    _show_recipe(recipe)
    with show.Watch() as watch:
        result = train(recipe, run, **limits, enforce=enforce, notify=watch)
    _show_result(result, as_json)


def _limits(plan: str | None, memory: str | None) -> dict[str, Any]:
    """What says how much a run may take: a plan, or bytes."""
    from talik.base.errors import UsageError
    from talik.base.files import parse_size
    from talik.recipe.plan import read_plan

    if plan and memory:
        raise UsageError("--plan and --memory: a plan says what it takes; name one")
    return {
        "plan": read_plan(Path(plan)) if plan else None,
        "memory": parse_size(memory, "--memory") if memory else None,
    }


def _show_recipe(recipe: Any) -> None:
    from talik.cli import show

    shown = [f"{name} {value}" for name, value in recipe.model_dump().items() if value not in (None, [])]
    show.said("recipe", "; ".join(shown))


def _show_result(result: Any, as_json: bool) -> None:
    from talik.base.files import quoted
    from talik.cli import show

    if as_json:
        show.result_json(result.as_dict())
        return
    show.result(f"{result.steps} steps in {result.seconds:.0f} s; the run is in {result.run}")
    if result.base and result.tuned:
        rows = [("base", result.base.measures()), ("tuned", result.tuned.measures())]
        for source, marks in result.by_source.items():
            rows += [(f"{name}, {source}", mark.measures()) for name, mark in marks.items()]
        show.result(show.comparison(rows))
    show.result(show.memory(result.memory))
    run = quoted(result.run)
    show.result(f"talk to it: talik chat {run}\nexport it:  talik export {run} FOLDER")


def resume_command(argv: list[str]) -> None:
    wanted = options(
        "Resume",
        ("run", positional(str, "folder of the run", "RUN")),
        ("enforce", arg(bool, ENFORCE), False),
        ("json", arg(bool, "print the result as JSON"), False),
    )
    parsed = parse("resume", wanted, argv, "Goes on with a run from its newest checkpoint, bit for bit.")
    from talik.cli import show
    from talik.run import resume

    quiet()
    with show.Watch() as watch:
        result = resume(parsed.run, enforce=parsed.enforce, notify=watch)
    _show_result(result, parsed.json)


def eval_command(argv: list[str]) -> None:
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
    from talik.cli import show
    from talik.evaluation import evaluate

    quiet()
    with show.Watch() as watch:
        report = evaluate(parsed["target"], parsed["data"], notify=watch, **given)
    if parsed["json"]:
        show.result_json(report)
        return
    marks = [(name, report[name]) for name in ("model", "base", "tuned") if name in report]
    for source, parts in report.get("by_source", {}).items():
        marks += [(f"{name}, {source}", mark) for name, mark in parts.items()]
    show.result(f"{report['examples']:,} examples, {report['trained_tokens']:,} trained tokens")
    show.result(show.comparison(marks))


def chat_command(argv: list[str]) -> None:
    wanted = options(
        "Chat",
        ("target", positional(str, "folder of a run, or a model", "RUN|MODEL")),
        ("prompt", arg(str | None, "ask this one question and end"), None),
        ("system", arg(str | None, "a system message"), None),
        ("base", arg(bool, "of a run: talk to the model as it was before"), False),
        ("max_tokens", arg(int, "longest answer"), 256),
        ("temperature", arg(float, "0: always the likeliest token"), 0.0),
        ("date", arg(str | None, DATE), None),
    )
    parsed = parse("chat", wanted, argv, "Talks to a run or a model. An empty line or Ctrl-D ends it.")
    from talik.base.errors import UsageError
    from talik.chat import Talk, chat_date, load_for_chat
    from talik.cli import show

    if parsed.max_tokens < 1 or parsed.temperature < 0:
        raise UsageError("--max-tokens must be at least 1, and --temperature at least 0")
    date = chat_date(parsed.target, parsed.date)

    quiet()
    with show.Watch() as watch:
        model, tokenizer = load_for_chat(parsed.target, base=parsed.base, date=date, notify=watch)
    system = [{"role": "system", "content": parsed.system}] if parsed.system else []
    talk = Talk(model, tokenizer, system, parsed.max_tokens, parsed.temperature)
    for question in [parsed.prompt] if parsed.prompt is not None else show.questions():
        for text in talk.ask(question):
            show.piece(text)
        show.piece("\n")


def export_command(argv: list[str]) -> None:
    wanted = options(
        "Export",
        ("run", positional(str, "folder of the run", "RUN")),
        ("out", positional(str, "a new folder", "OUT")),
        ("adapter", arg(bool, "adapters by themselves, as a folder of PEFT, in place of merged"), False),
    )
    parsed = parse("export", wanted, argv, "Writes the result of a run as a plain Transformers folder.")
    from talik.cli import show
    from talik.exporting.whole import export

    quiet()
    with show.Watch() as watch:
        exported = export(parsed.run, parsed.out, adapter=parsed.adapter, notify=watch)
    what = "a folder of PEFT" if parsed.adapter else "a plain Transformers folder"
    show.result(f"{exported.folder}: {show.format_bytes(exported.size)}, {what}")


def inspect_command(argv: list[str]) -> None:
    wanted = options(
        "Inspect",
        ("model", positional(str, "a folder, a config.json, a hub id or a .gguf file", "MODEL")),
        ("top_layers", arg(int | None, "say what training the last N layers would train"), None),
        ("json", arg(bool, "print it as JSON"), False),
    )
    parsed = parse("inspect", wanted, argv, "A model's config in words and its sizes; no weights are read.")
    from talik.cli import show
    from talik.model.inspection import inspect_model, inspection_text

    quiet()
    inspection = inspect_model(parsed.model, top_layers=parsed.top_layers)
    if parsed.json:
        show.result_json(inspection.as_dict())
    else:
        show.result(inspection_text(inspection))


def cache_command(argv: list[str]) -> None:
    wanted = options(
        "Cache",
        ("action", positional(Literal["list", "clear"], "show caches, or remove them", "list|clear")),
        ("keys", positional(list[str], "these alone; the beginning of a key is enough", "[KEY ...]"), []),
        ("all", arg(bool, "with clear: every cache"), False),
        ("cache", arg(str | None, "folder of the caches; default: Talik's own"), None),
        ("json", arg(bool, "print it as JSON"), False),
    )
    parsed = parse("cache", wanted, argv, "What the trunk handed on: kept for the next run, listed, removed.")
    from talik.base.errors import UsageError
    from talik.cli import show
    from talik.training.trunk.cache_folder import cache_folders, chosen, default_root, remove

    root = Path(parsed.cache) if parsed.cache else default_root()
    if parsed.action == "clear" and bool(parsed.keys) == parsed.all:
        remedy = "`talik cache list` shows the keys."
        raise UsageError("name the caches to remove, or --all for every one", where=root, remedy=remedy)
    folders = chosen(root, parsed.keys) if parsed.keys else cache_folders(root)
    if parsed.action == "clear":
        show.cleared(root, [(folder, remove(folder)) for folder in folders], parsed.json)
    else:
        show.caches(root, folders, parsed.json)


def demo_command(argv: list[str]) -> None:
    wanted = options(
        "Demo",
        ("output", arg(str, "folder for the data, the run and the model", "-o"), "talik-demo"),
    )
    parsed = parse("demo", wanted, argv, "Fine-tunes SmolLM2-135M-Instruct on real questions and answers.")
    from talik.cli.demo import demo

    quiet()
    demo(Path(parsed.output))
