"""The commands about what a run takes: the plan, the machine it is for, and why memory ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from talik.cli.options import DATA_FIELDS, MORE_DATA, arg, options, parse, positional, recipe_fields

PLANNED = (
    *(*DATA_FIELDS, "eval_data", "held_out", "shuffle"),
    *("top_layers", "thaw", "lora", "precision", "optimizer", "clip", "epochs", "steps", "batch_tokens"),
    *("momentum", "eval_every", "seed", "trunk", "device", "revision"),
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
    from talik.base.errors import UsageError
    from talik.cli import show
    from talik.cli.machine_text import machine_text
    from talik.machine.machine import described_machine, save_machine, this_machine

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
        ("data", positional(str | None, "rows, for the true lengths", "[DATA]"), None),
        MORE_DATA,
        ("top_layers", arg(int | Literal["auto"], "train the last N layers; auto: the most that fit"), 5),
        ("memory", arg(str | None, "what the run may take, as in 8GiB; default: what is free now"), None),
        ("ram", arg(str | None, "what it may take of the RAM beside a GPU"), None),
        ("disk", arg(str | None, "what it may write"), None),
        ("machine", arg(str | None, "another computer: a YAML file, or a GPU's name"), None),
        ("picture", arg(str | None, "memory over the run, stacked by cause, to this .svg or .png"), None),
        ("json", arg(bool, "print it as JSON"), False),
        *recipe_fields([name for name in PLANNED if name != "top_layers"]),
    )
    parsed = vars(parse("plan", wanted, argv, "What a run will take, before a weight is loaded."))
    from talik.base.errors import DoesNotFitError
    from talik.cli import show
    from talik.plan.picture import write_picture
    from talik.plan.report import plan_text

    recipe, sizes = _asked(parsed)
    with show.Watch() as watch:
        planned = _planned(recipe, parsed, sizes, watch)
    if parsed["picture"]:
        program = planned.target.program if planned.target.on_cpu else 0
        write_picture(
            planned.simulation, Path(parsed["picture"]), budget=planned.target.memory, program=program
        )
        show.said("written", parsed["picture"])
    if parsed["json"]:
        show.result_json(planned.as_dict())
    else:
        show.result(plan_text(planned))
    if not planned.fits:
        ways = " | ".join(change.options for change in planned.changes)
        raise DoesNotFitError(planned.problem, remedy=f"Any of these alone would make it fit: {ways}")


def explain_command(argv: list[str]) -> None:
    wanted = options(
        "Explain",
        ("target", positional(str, "a model (its config is enough), or the folder of a run", "MODEL|RUN")),
        ("habit", arg(str | None, "with MODEL: what fills memory or spoils labels, by its name"), None),
        ("memory", arg(str | None, "with MODEL: the memory that it fills, as in 8GiB"), None),
        ("top_layers", arg(int, "with MODEL: the last N layers are trained"), 5),
        ("json", arg(bool, "print it as JSON"), False),
    )
    parsed = parse(
        "explain", wanted, argv, "Why memory ends: in a common habit, or in a run that did not fit."
    )
    from talik.base.errors import UsageError
    from talik.base.files import read_json
    from talik.cli import show
    from talik.diagnose.habits import HABITS, habit
    from talik.diagnose.run import explain_run
    from talik.training.run.folder import REFUSED, is_run

    folder = Path(parsed.target)
    of_run = (folder / REFUSED).is_file() or is_run(folder)
    if of_run and (parsed.habit or parsed.memory):
        raise UsageError(f"{folder} is a run: --habit and --memory are for a model")
    if (folder / REFUSED).is_file():
        _explain_refused(folder / REFUSED, parsed.json)
    elif of_run:
        found = explain_run(folder)
        if parsed.json:
            show.result_json([finding.as_dict() for finding in found])
        elif found:
            show.result("\n\n".join(map(str, found)))
        else:
            show.result("the run kept its promise")
            show.result(show.memory(read_json(folder / "results.json")["memory"]))
    elif parsed.habit is None:
        shown = "\n".join(f"  {name:<21}{about.see}" for name, about in HABITS.items())
        raise UsageError(f"{parsed.target} is no run; of a model, name a habit with --habit:\n{shown}")
    else:
        from talik.model.folder import open_model

        model = open_model(parsed.target, weights=False)
        report = habit(parsed.habit, model, parsed.memory, top_layers=parsed.top_layers)
        show.result_json(report.as_dict()) if parsed.json else show.result(str(report))


def _explain_refused(file: Path, as_json: bool) -> None:
    """Plans the refused run once more, with the changes that would fit."""
    from talik.base.files import read_json
    from talik.cli import show
    from talik.plan.report import plan_text
    from talik.recipe.recipe import checked_recipe

    kept = read_json(file)
    recipe = checked_recipe(kept["recipe"], file)
    given = {"data": recipe.data, "machine": None, "top_layers": recipe.top_layers}
    with show.Watch() as watch:
        planned = _planned(recipe, given, {"memory": kept["planned"]["budget_bytes"]}, watch)
    show.result_json(planned.as_dict()) if as_json else show.result(plan_text(planned))


def _asked(parsed: dict[str, Any]) -> tuple[Any, dict[str, int | None]]:
    """The recipe, and the limits that were named, in bytes; one error with all that is wrong."""
    from talik.base.errors import collect_errors
    from talik.base.files import parse_size
    from talik.plan.picture import picture_kind
    from talik.recipe.recipe import checked_recipe

    named = [name for name in ("memory", "ram", "disk") if parsed[name]]
    fields = {name: parsed[name] for name in PLANNED if parsed[name] not in (None, "auto")}
    recipe, _, _, *sizes = collect_errors(
        lambda: checked_recipe({"model": parsed["model"], "data": parsed["data"] or "-", **fields}),
        partial(_check_two_ways, parsed),
        lambda: picture_kind(Path(parsed["picture"])) if parsed["picture"] else None,
        *(partial(parse_size, parsed[name], f"--{name}") for name in named),
    )
    return recipe, dict(zip(named, sizes, strict=True))


def _check_two_ways(parsed: dict[str, Any]) -> None:
    """UsageError for options of which one says what another says, too."""
    from talik.base.errors import UsageError

    if parsed["machine"] and parsed["device"] != "auto":
        raise UsageError("--machine describes another computer: leave out --device")
    if parsed["thaw"] and parsed["top_layers"] == "auto":
        raise UsageError("--thaw and --top-layers auto are two ways to say what is trained: name one")


def _planned(recipe: Any, parsed: dict[str, Any], sizes: Mapping[str, int | None], watch: Any) -> Any:
    """The plan, for the most layers that fit where that is asked for; with what would help if none does."""
    from talik.data.dataset import check_positions
    from talik.machine.machine import described_machine
    from talik.plan.changes import most_layers, smallest_changes
    from talik.plan.search import plan_run
    from talik.plan.target import machine_here, target_of

    model, read = _model_and_data(recipe, parsed["data"], watch)
    sets = (read[0].examples if read[0] else None, read[1].examples if read[1] else ())
    if parsed["data"]:
        check_positions(model.config, *read)
    else:
        positions = getattr(model.text_config, "max_position_embeddings", None)
        recipe = recipe.model_copy(
            update={"max_length": min(recipe.max_length, positions or recipe.max_length)}
        )
    named = parsed["machine"]
    machine = described_machine(named) if named else machine_here(recipe.device, watch)
    target = target_of(machine, **sizes)
    if parsed["top_layers"] == "auto":
        layers = most_layers(recipe, model, sets, target, watch)
        recipe = recipe.model_copy(update={"top_layers": layers})
    planned = plan_run(recipe, model, *sets, target=target, notify=watch)
    if planned.fits:
        return planned
    changes = smallest_changes(planned, recipe, model, sets, watch)
    return dataclasses.replace(planned, changes=changes)


def _model_and_data(recipe: Any, data: Any, notify: Any) -> tuple[Any, Any]:
    """The model, and the data to train on and to evaluate on, if there are any."""
    from talik.data.dataset import read_sets
    from talik.model.folder import open_model
    from talik.model.tokenizer import load_tokenizer

    model = open_model(recipe.model, revision=recipe.revision, weights=False)
    if not data:
        return model, (None, None)
    load = partial(load_tokenizer, model.path)
    sets = read_sets(recipe, model.tokenizer(), load=load, notify=notify)
    for found in sets:
        if found is not None:
            notify(found)
    return model, sets
