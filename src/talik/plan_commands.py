"""The commands about what a run would take: the machine it runs on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from talik.options import arg, options, parse, positional, recipe_fields

PLANNED = (
    *("input_field", "output_field", "train_on", "max_length", "too_long", "held_out", "top_layers", "also"),
    *("precision", "epochs", "batch_tokens", "seed", "trunk", "device"),
)


def machine_command(argv: list[str]) -> None:
    wanted = options(
        "Machine",
        ("machine", arg(str | None, "describe another: a YAML file, or a GPU's name as in 'RTX 4090'"), None),
        ("device", arg(str, "auto, cpu, cuda, cuda:1, mps, ..."), "auto"),
        ("measure", arg(bool, "measure anew, whatever is kept"), False),
        ("save", arg(str | None, "write it as YAML to this file, for --machine"), None),
        ("json", arg(bool, "print it as JSON"), False),
    )
    parsed = parse("machine", wanted, argv, "What this computer has, and how fast it is; measured once.")
    from talik import show
    from talik.errors import UsageError
    from talik.machine import described_machine, machine_text, save_machine, this_machine

    if parsed.machine and (parsed.measure or parsed.device != "auto"):
        raise UsageError("--machine describes another computer: leave out --measure and --device")
    with show.Watch() as watch:
        if parsed.machine:
            machine = described_machine(parsed.machine)
        else:
            machine = this_machine(parsed.device, anew=parsed.measure, notify=watch)
    if parsed.json:
        show.result_json(dataclasses.asdict(machine))
    else:
        show.result(machine_text(machine))
    if parsed.save:
        save_machine(machine, Path(parsed.save))
        show.said("written", parsed.save)


def plan_command(argv: list[str]) -> None:
    wanted = options(
        "Plan",
        ("model", positional(str, "a folder (config.json is enough), a hub id or a .gguf file", "MODEL")),
        ("data", positional(str | None, "a file of rows, for the true lengths", "[DATA]"), None),
        ("memory", arg(str | None, "what the run may take, as in 8GiB; default: what is free now"), None),
        ("json", arg(bool, "print it as JSON"), False),
        *recipe_fields(PLANNED),
    )
    parsed = vars(parse("plan", wanted, argv, "What a run will take, before a weight is loaded."))
    from talik import show
    from talik.errors import DoesNotFitError
    from talik.files import parse_size
    from talik.plan.report import plan_text
    from talik.plan.ways import plan_run
    from talik.recipe import check

    memory = parse_size(parsed["memory"]) if parsed["memory"] else None
    fields = {name: parsed[name] for name in PLANNED if parsed[name] is not None}
    recipe = check({"model": parsed["model"], "data": parsed["data"] or "-", **fields})
    with show.Watch() as watch:
        folder, examples = _model_and_examples(recipe, parsed["data"], watch)
        planned = plan_run(recipe, folder, examples, memory=memory, notify=watch)
    if parsed["json"]:
        show.result_json(planned.as_dict())
    else:
        show.result(plan_text(planned))
    if not planned.fits:
        raise DoesNotFitError(
            f"no way to run this fits {show.in_words(planned.budget)}",
            remedy="Train fewer layers (--top-layers), or give it more memory (--memory).",
        )


def _model_and_examples(recipe: Any, data: str | None, notify: Any) -> tuple[Path, Any]:
    """The model's folder, and the examples of the data if there is any."""
    from talik.data.dataset import read_all
    from talik.model.source import find_model
    from talik.train.run_folder import load_tokenizer

    folder = find_model(recipe.model, weights=False).folder
    if data is None:
        return folder, None
    read = read_all(recipe, data, load_tokenizer(folder), "training")
    notify(read)
    return folder, read.examples
