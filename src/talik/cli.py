"""The command line. A command's parser is built only once the command is known, so that help is quick."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from talik import __version__
from talik.errors import NoRoomError, TalikError, UsageError

HELP = """usage: talik COMMAND ...

Fine-tunes the top layers of a language model on the machine you have.

  inspect MODEL             the model's config and sizes in words; no weights are read
  preview DATA --model M    which tokens are trained and which are masked
  train MODEL DATA -o RUN   train; every option: talik train --help
  resume RUN                go on with a run that was stopped
  eval RUN|MODEL DATA       loss, perplexity and accuracy; base beside tuned
  chat RUN|MODEL            talk to it
  export RUN OUT            the result as a plain Transformers folder
  demo                      all of this on a small model and real questions, in minutes

MODEL is a folder, a Hugging Face id, modelscope:ORG/NAME or a .gguf file.
Exit codes: 0 done, 1 failed, 2 asked for something that cannot be done, 3 does not fit.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"talik {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"talik: there is no command {argv[0]!r}\n\n{HELP}", end="", file=sys.stderr)
        return 2
    return _guarded(COMMANDS[argv[0]], argv[1:])


def _guarded(command: Callable[[list[str]], None], argv: list[str]) -> int:
    """Turns what a command raises on purpose into a message and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        command(argv)
    except SystemExit as stop:  # tyro has printed the help, or what is wrong
        return int(stop.code or 0)
    except TalikError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail(TalikError("stopped by Ctrl-C", remedy="`talik resume RUN` goes on with a run."))
    except Exception as error:
        known = _of_the_disk(error)
        if known is None:
            raise
        return _fail(known)
    return 0


def _of_the_disk(error: Exception) -> TalikError | None:
    """The user's side of a disk that is full or a place that is closed; None for every other error."""
    number, where = getattr(error, "errno", None), getattr(error, "filename", None)
    if number == errno.ENOSPC or re.search(r"os error (28|112)\)", str(error)):  # safetensors' own class
        remedy = "Make room; a run goes on with: talik resume RUN"
        return NoRoomError("the disk is full; nothing was left half-written", where=where, remedy=remedy)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return UsageError(f"cannot be used: {os.strerror(number)}", where=where, remedy="Name another place.")
    return None


def _fail(error: TalikError) -> int:
    from talik import show

    show.failure(error)
    return error.exit_code


def _parse(command: str, options: type, argv: list[str], description: str) -> Any:
    import tyro

    return tyro.cli(options, args=argv, prog=f"talik {command}", description=description, add_help=True)


def _arg(kind: Any, help: str, *aliases: str, name: str | None = None) -> Any:
    import tyro

    return Annotated[kind, tyro.conf.arg(name=name, help=help, aliases=list(aliases) or None)]


def _positional(kind: Any, help: str, metavar: str) -> Any:
    import tyro

    return Annotated[kind, tyro.conf.Positional, tyro.conf.arg(help=help, metavar=metavar)]


def _options(name: str, *fields: tuple[str, Any] | tuple[str, Any, Any]) -> type:
    """A dataclass of options: (name, type) or (name, type, default); required ones first."""
    made = [
        (field[0], field[1], dataclasses.field(default_factory=lambda value=field[2]: value))
        if len(field) == 3
        else field
        for field in sorted(fields, key=len)
    ]
    return dataclasses.make_dataclass(name, made)


def _recipe_fields(names: Sequence[str] | None = None, **shown: Any) -> list[Any]:
    """Options for fields of the Recipe, with its help and its defaults, or the `shown` ones."""
    from talik.recipe import Recipe

    fields: list[Any] = []
    for name, field in Recipe.model_fields.items():
        if names is not None and name not in names:
            continue
        help = field.description or ""
        if not field.is_required():
            default = shown.get(name, field.get_default(call_default_factory=True))
            fields.append((name, _arg(field.annotation, help), default))
        elif name in shown:
            fields.append((name, _positional(str | None, help, name.upper()), shown[name]))
        else:
            fields.append((name, _positional(str, help, name.upper())))
    return fields


DATA_FIELDS = ("input_field", "output_field", "train_on", "max_length", "too_long")


def _train(argv: list[str]) -> None:
    """Positional and named options over recipe.yaml over defaults; all wrong ones reported at once."""
    from talik.recipe import Recipe, check, read_fields

    first = argparse.ArgumentParser("talik train", add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config")
    config = first.parse_known_args(argv)[0].config
    written = read_fields(Path(config)) if config else {}
    shown = {key: value for key, value in written.items() if _fits(key, value)}
    if config:  # MODEL and DATA keep their places, whichever of them the file names
        shown = {"model": None, "data": None, **shown}
    help_config = "a recipe.yaml whose fields stand in for the defaults"
    options = _options(
        "Train",
        *_recipe_fields(**shown),
        ("run", _arg(str, "folder of the run; must be new", "-o", name="output")),
        ("config", _arg(str | None, help_config, "-c"), None),
        ("json", _arg(bool, "print the result as JSON"), False),
    )
    parsed = vars(_parse("train", options, argv, "Trains the top of a model on a file of rows."))
    run, as_json = parsed.pop("run"), parsed.pop("json")
    del parsed["config"]
    defaults = {name: field.default for name, field in Recipe.model_fields.items()} | {"also": []} | shown
    given = {name: value for name, value in parsed.items() if name not in defaults or value != defaults[name]}
    recipe = check({**written, **given}, config)

    from talik import show
    from talik.run import train

    _quiet()
    _show_recipe(recipe)
    with show.Watch() as watch:
        result = train(recipe, run, notify=watch)
    _show_result(result, as_json)


def _fits(name: str, value: Any) -> bool:
    from pydantic import TypeAdapter, ValidationError

    from talik.recipe import Recipe

    try:
        kind: Any = Recipe.model_fields[name].annotation
        TypeAdapter(kind).validate_python(value)
    except (KeyError, ValidationError):
        return False
    return True


def _show_recipe(recipe: Any) -> None:
    from talik import show

    shown = [f"{name} {value}" for name, value in recipe.model_dump().items() if value not in (None, [])]
    show.said("recipe", "; ".join(shown))


def _show_result(result: Any, as_json: bool) -> None:
    from talik import show

    if as_json:
        show.result_json(dataclasses.asdict(result))
        return
    show.result(f"{result.steps} steps in {result.seconds:.0f} s; the run is in {result.run}")
    if result.base and result.tuned:
        rows = [("base", result.base.measures()), ("tuned", result.tuned.measures())]
        show.result(show.comparison(rows))
    show.result(f"talk to it: talik chat {result.run}\nexport it:  talik export {result.run} FOLDER")


def _resume(argv: list[str]) -> None:
    options = _options(
        "Resume",
        ("run", _positional(str, "folder of the run", "RUN")),
        ("json", _arg(bool, "print the result as JSON"), False),
    )
    parsed = _parse("resume", options, argv, "Goes on with a run from its newest checkpoint, bit for bit.")
    from talik import show
    from talik.run import resume

    _quiet()
    with show.Watch() as watch:
        result = resume(parsed.run, notify=watch)
    _show_result(result, parsed.json)


def _eval(argv: list[str]) -> None:
    unset = {name: None for name in DATA_FIELDS}
    fields = [
        (name, _optional(kind), default) for name, kind, default in _recipe_fields(DATA_FIELDS, **unset)
    ]
    options = _options(
        "Eval",
        ("target", _positional(str, "folder of a run, or a model", "RUN|MODEL")),
        ("data", _positional(str, "a file of rows: JSON, JSON lines or CSV", "DATA")),
        *fields,
        ("json", _arg(bool, "print the result as JSON"), False),
    )
    parsed = vars(_parse("eval", options, argv, "Loss per trained token, perplexity and token accuracy."))
    given = {name: parsed[name] for name in DATA_FIELDS if parsed[name] is not None}
    from talik import show
    from talik.evaluate import evaluate

    _quiet()
    with show.Watch() as watch:
        report = evaluate(parsed["target"], parsed["data"], notify=watch, **given)
    if parsed["json"]:
        show.result_json(report)
        return
    marks = [(name, report[name]) for name in ("model", "base", "tuned") if name in report]
    show.result(f"{report['examples']:,} examples, {report['trained_tokens']:,} trained tokens")
    show.result(show.comparison(marks))


def _optional(kind: Any) -> Any:
    """The annotation of an option that may be left out."""
    inner, *metadata = kind.__origin__, *kind.__metadata__
    return Annotated[inner | None, *metadata]


def _chat(argv: list[str]) -> None:
    options = _options(
        "Chat",
        ("target", _positional(str, "folder of a run, or a model", "RUN|MODEL")),
        ("prompt", _arg(str | None, "ask this one question and end"), None),
        ("system", _arg(str | None, "a system message"), None),
        ("base", _arg(bool, "of a run: talk to the model as it was before"), False),
        ("max_tokens", _arg(int, "longest answer"), 256),
        ("temperature", _arg(float, "0: always the likeliest token"), 0.0),
    )
    parsed = _parse("chat", options, argv, "Talks to a run or a model. An empty line or Ctrl-D ends it.")
    from talik import show
    from talik.chat import answer, load_for_chat

    _quiet()
    with show.Watch() as watch:
        model, tokenizer = load_for_chat(parsed.target, base=parsed.base, notify=watch)
    messages = [{"role": "system", "content": parsed.system}] if parsed.system else []
    for question in [parsed.prompt] if parsed.prompt is not None else show.questions():
        messages.append({"role": "user", "content": question})
        pieces = []
        for text in answer(
            model, tokenizer, messages, max_tokens=parsed.max_tokens, temperature=parsed.temperature
        ):
            show.piece(text)
            pieces.append(text)
        show.piece("\n")
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _export(argv: list[str]) -> None:
    options = _options(
        "Export",
        ("run", _positional(str, "folder of the run", "RUN")),
        ("out", _positional(str, "a new folder", "OUT")),
    )
    parsed = _parse("export", options, argv, "Writes the result of a run as a plain Transformers folder.")
    from talik import show
    from talik.export import export

    _quiet()
    with show.Watch() as watch:
        exported = export(parsed.run, parsed.out, notify=watch)
    show.result(f"{exported.folder}: {show.in_words(exported.size)}, a plain Transformers folder")


def _inspect(argv: list[str]) -> None:
    options = _options(
        "Inspect",
        ("model", _positional(str, "a folder, a config.json, a hub id or a .gguf file", "MODEL")),
        ("top_layers", _arg(int, "say what training the last N layers would train"), 5),
        ("json", _arg(bool, "print it as JSON"), False),
    )
    parsed = _parse("inspect", options, argv, "A model's config in words and its sizes; no weights are read.")
    from talik import show
    from talik.model.inspection import inspect_model, inspection_text

    _quiet()
    inspection = inspect_model(parsed.model, top_layers=parsed.top_layers)
    if parsed.json:
        show.result_json(inspection.as_dict())
    else:
        show.result(inspection_text(inspection))


def _preview(argv: list[str]) -> None:
    options = _options(
        "Preview",
        ("data", _positional(str, "a file of rows: JSON, JSON lines or CSV", "DATA")),
        ("model", _arg(str, "the model whose tokenizer and chat template are used")),
        ("count", _arg(int, "how many examples", "-n"), 3),
        ("html", _arg(str | None, "write a page to this file, too"), None),
        *_recipe_fields(DATA_FIELDS),
    )
    parsed = vars(_parse("preview", options, argv, "Shows every token of examples, trained or masked."))
    from talik import show
    from talik.data.dataset import preview, read_data
    from talik.data.preview import preview_html
    from talik.files import write_text
    from talik.model.source import find_model
    from talik.train.run_folder import load_tokenizer

    _quiet()
    tokenizer = load_tokenizer(find_model(parsed["model"], weights=False).folder)
    data = read_data(parsed["data"], tokenizer, **{name: parsed[name] for name in DATA_FIELDS})
    for line in show.data_lines(data):
        show.said("data", line)
    for part in preview(data, tokenizer, parsed["count"]):
        show.result(part)
    if parsed["html"]:
        write_text(Path(parsed["html"]), preview_html(data.examples[: parsed["count"]], tokenizer))
        show.said("written", parsed["html"])


def _demo(argv: list[str]) -> None:
    options = _options(
        "Demo",
        ("output", _arg(str, "folder for the data, the run and the model", "-o"), "talik-demo"),
    )
    parsed = _parse("demo", options, argv, "Fine-tunes SmolLM2-135M-Instruct on real questions and answers.")
    from talik.demo import demo

    _quiet()
    demo(Path(parsed.output))


def _quiet() -> None:
    """Transformers' own progress bars would break the progress line."""
    from transformers.utils import logging

    logging.disable_progress_bar()


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "inspect": _inspect,
    "preview": _preview,
    "train": _train,
    "resume": _resume,
    "eval": _eval,
    "chat": _chat,
    "export": _export,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
