"""`talik plan`: memory, time and disk of a run, before a weight is loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from talik.base.errors import DoesNotFitError, UsageError, collect_errors
from talik.base.files import parse_size
from talik.cli.options import (
    DATA_FIELDS,
    MORE_DATA,
    arg,
    check_two_ways,
    options,
    parse,
    positional,
    recipe_fields,
)
from talik.cli.show import console
from talik.recipe.recipe import checked_recipe

PLANNED = (
    *(*DATA_FIELDS, "eval_data", "held_out", "shuffle"),
    *("top_layers", "thaw", "lora", "precision", "optimizer", "clip", "epochs", "steps", "batch_tokens"),
    *("momentum", "eval_every", "seed", "trunk", "device", "revision"),
)


def command(argv: list[str]) -> None:
    wanted = options(
        "Plan",
        ("model", positional(str, "a folder (config.json is enough), a hub id or a .gguf file", "MODEL")),
        ("data", positional(str | None, "rows, for the true lengths", "[DATA]"), None),
        MORE_DATA,
        ("top_layers", arg(int | Literal["auto"], "train the last N layers; auto: the most that fit"), 5),
        ("memory", arg(str | None, "memory the run may take, as in 8GiB; default: what is free"), None),
        ("ram", arg(str | None, "host RAM the run may take, with a GPU"), None),
        ("disk", arg(str | None, "disk space the run may take"), None),
        ("machine", arg(str | None, "another computer: a YAML file, or a GPU's name"), None),
        ("picture", arg(str | None, "draw memory over the run by cause to this .svg or .png"), None),
        ("json", arg(bool, "print it as JSON"), False),
        *recipe_fields([name for name in PLANNED if name != "top_layers"]),
    )
    parsed = vars(
        parse("plan", wanted, argv, "Plans memory, time and disk of a run before a weight is loaded.")
    )
    from talik.cli.show.watch import Watch
    from talik.plan.asked import plan_asked
    from talik.plan.picture import write_picture
    from talik.plan.report import plan_text

    recipe, sizes = _asked(parsed, argv)
    with Watch() as watch:
        planned = plan_asked(
            recipe,
            data=bool(parsed["data"]),
            machine=parsed["machine"],
            most=parsed["top_layers"] == "auto",
            sizes=sizes,
            notify=watch,
        )
    if parsed["picture"]:
        program = planned.target.program if planned.target.on_cpu else 0
        write_picture(
            planned.simulation, Path(parsed["picture"]), budget=planned.target.memory, program=program
        )
        console.said("written", parsed["picture"])
    if parsed["json"]:
        console.result_json(planned.as_dict())
    else:
        console.result(plan_text(planned))
    if not planned.fits:
        ways = " | ".join(change.options for change in planned.changes)
        raise DoesNotFitError(planned.problem, remedy=f"Any of these alone would make it fit: {ways}")


def _asked(parsed: dict[str, Any], argv: list[str]) -> tuple[Any, dict[str, int | None]]:
    """The recipe and the limits in bytes; all mistakes are reported at once."""
    from talik.plan.picture import picture_kind

    named = [name for name in ("memory", "ram", "disk") if parsed[name]]
    fields = {name: parsed[name] for name in PLANNED if parsed[name] not in (None, "auto")}
    recipe, _, _, _, *sizes = collect_errors(
        lambda: checked_recipe({"model": parsed["model"], "data": parsed["data"] or "-", **fields}),
        partial(_check_machine, parsed),
        partial(check_two_ways, argv, parsed["top_layers"]),
        lambda: picture_kind(Path(parsed["picture"])) if parsed["picture"] else None,
        *(partial(parse_size, parsed[name], f"--{name}") for name in named),
    )
    return recipe, dict(zip(named, sizes, strict=True))


def _check_machine(parsed: dict[str, Any]) -> None:
    """Raises UsageError for --device next to --machine."""

    if parsed["machine"] and parsed["device"] != "auto":
        raise UsageError("--machine describes another computer: leave out --device")
