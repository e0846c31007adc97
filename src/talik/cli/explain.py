"""`talik explain`: why a run did not fit or a common training loop runs out of memory."""

from __future__ import annotations

from pathlib import Path

from talik.base.errors import UsageError
from talik.base.files import read_json
from talik.cli.options import arg, options, parse, positional
from talik.cli.show import console
from talik.recipe.recipe import checked_recipe


def command(argv: list[str]) -> None:
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
    from talik.cli.show import tables
    from talik.diagnose.habits import HABITS, habit
    from talik.diagnose.run import explain_run
    from talik.model.folder import open_model
    from talik.training.run.folder import REFUSED, is_run

    folder = Path(parsed.target)
    of_run = (folder / REFUSED).is_file() or is_run(folder)
    if of_run and (parsed.habit or parsed.memory):
        raise UsageError(f"{folder} is a run: --habit and --memory are for a model")
    if (folder / REFUSED).is_file():
        _explain_refused(folder / REFUSED, parsed.json)
    elif of_run:
        explained = explain_run(folder)
        if parsed.json:
            console.result_json(explained.as_dict())
        else:
            console.result(str(explained))
            console.result("")
            console.result(tables.memory(explained.memory))
    elif parsed.habit is None:
        shown = "\n".join(f"  {name:<21}{about.see}" for name, about in HABITS.items())
        raise UsageError(f"{parsed.target} is not a run; of a model, name a habit with --habit:\n{shown}")
    else:
        model = open_model(parsed.target, weights=False)
        report = habit(parsed.habit, model, parsed.memory, top_layers=parsed.top_layers)
        console.result_json(report.as_dict()) if parsed.json else console.result(str(report))


def _explain_refused(file: Path, as_json: bool) -> None:
    """Plans the refused run once more, with the changes that would fit."""
    from talik.cli.show.watch import Watch
    from talik.plan.asked import plan_asked
    from talik.plan.report import plan_text

    kept = read_json(file)
    recipe = checked_recipe(kept["recipe"], file)
    with Watch() as watch:
        sizes = {"memory": kept["planned"]["budget_bytes"]}
        planned = plan_asked(recipe, data=True, sizes=sizes, notify=watch)
    console.result_json(planned.as_dict()) if as_json else console.result(plan_text(planned))
