"""A run folder: recipe.yaml, plan.json, source.json, metrics.jsonl, results.json, log.txt, checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from talik.base.errors import RunError
from talik.base.events import Notify, Status, silent
from talik.base.files import check_folder_place, finished_folder, quoted, read_json, write_json
from talik.model.folder import ModelFolder
from talik.model.source.source import Source, find_model
from talik.model.weights.digests import weights_fingerprint
from talik.recipe.plan import Plan, read_plan
from talik.recipe.recipe import Recipe, checked_recipe
from talik.recipe.recipe_file import read_fields, write_recipe
from talik.training.run.checkpoint_digests import STATE, WEIGHTS, verified
from talik.training.run.checkpoints import checkpoint_path, latest_checkpoint

FILES = ("recipe.yaml", "plan.json", "source.json")  # what makes a folder a run
REFUSED = "refused.json"


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says about itself, and the model that it began with."""

    folder: Path
    recipe: Recipe
    plan: Plan
    source: Source
    model: ModelFolder
    date: str | None = None  # that the chat template writes for today's


def is_run(path: str | Path) -> bool:
    """Whether a path is a run folder."""
    return (Path(path) / "recipe.yaml").is_file()


def check_new(folder: Path) -> None:
    """RunError if the folder has something in it, or cannot be one."""
    if blocked := next((parent for parent in folder.parents if parent.is_file()), None):
        problem = f"cannot be used: Not a directory: {blocked}"
        raise RunError(problem, where=folder, remedy="Name another place.")
    check_folder_place(folder)
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {REFUSED}):
        go_on = f"Go on with it: talik resume {quoted(folder)}\n  Or name" if is_run(folder) else "Name"
        raise RunError("exists already", where=folder, remedy=f"{go_on} a folder that is new or empty.")


def start_run(
    folder: Path,
    recipe: Recipe,
    plan: Plan,
    source: Source,
    model: ModelFolder,
    data: str,
    date: str | None = None,
) -> Run:
    """Makes the folder with what the run will be, whole or not at all; `data` names the examples."""
    known = {
        "folder": str(source.folder.resolve()),
        "origin": source.origin,
        "kind": source.kind,
        "revision": source.revision,
        "weights": weights_fingerprint(source.folder),
        "examples": data,
        "date": date,
    }
    check_new(folder)  # once more: another run may have begun in it while this one was planned
    (folder / REFUSED).unlink(missing_ok=True)
    with finished_folder(folder) as part:
        write_json(part / "source.json", known)
        write_json(part / "plan.json", plan.model_dump())
        write_recipe(recipe, part / "recipe.yaml")
    return Run(folder, recipe, plan, source, model, date)


def refuse_run(folder: Path, recipe: Recipe, planned: dict[str, Any]) -> None:
    """Keeps why a run was refused in the folder that it would have had, which stays free for another."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REFUSED, {"recipe": recipe.model_dump(), "planned": planned})


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Holds a run folder: RunError where another process works on it."""
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError("another process works on this run", where=folder, remedy="Wait for it.") from None
    try:
        yield
    finally:
        lock.release()


def check_same_data(run: Run, data: str) -> None:
    """RunError if the examples are not those that the run began with."""
    known = read_json(run.folder / "source.json")
    if "examples" not in known:
        problem = "began with an earlier version of Talik, which named its examples in another way"
        remedy = "Go on with the version that the run began with, or begin a new run."
        raise RunError(problem, where=run.folder, remedy=remedy)
    if known["examples"] != data:
        raise RunError(
            "the examples that the data give are not those that this run began with",
            where=run.folder,
            remedy="Put the former rows, tokenizer and chat template back, or start a new run.",
        )


def open_run(folder: str | Path, notify: Notify) -> Run:
    """A run that was started. RunError if the folder is none, or its model's weights are others now."""
    folder = Path(folder)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        problem = (
            f"is not a run folder: {', '.join(missing)} missing" if folder.exists() else "no such folder"
        )
        raise RunError(problem, where=folder, remedy="Name the folder that `talik train -o` was given.")
    recipe = checked_recipe(read_fields(folder / "recipe.yaml"), folder / "recipe.yaml")
    plan = read_plan(folder / "plan.json")
    known = read_json(folder / "source.json")
    model = known["folder"] if Path(known["folder"]).is_dir() else recipe.model
    source = find_model(model, revision=recipe.revision, progress=lambda text: notify(Status("model", text)))
    source = replace(source, origin=known["origin"], kind=known["kind"], revision=known["revision"])
    if weights_fingerprint(source.folder) != known["weights"]:
        raise RunError(
            f"the weights of {recipe.model} are not those that this run began with",
            where=source.folder,
            remedy="Put the former weights back, or begin a new run: talik train",
        )
    return Run(folder, recipe, plan, source, ModelFolder.of(source), known.get("date"))


def result_checkpoint(folder: Path, notify: Notify = silent) -> Path:
    """The checkpoint that a run is used by, verified: the best one if it was evaluated, else the newest.

    Where the best one was removed (it may have been damaged), `notify` is told, and the newest is used.

    Raises:
        RunError: There is none yet, or it is not whole.
    """
    newest = latest_checkpoint(folder)
    if newest is None:
        raise RunError(
            "has no checkpoint yet", where=folder, remedy=f"Go on with: talik resume {quoted(folder)}"
        )
    best = read_json(verified(newest, [STATE]) / STATE)["best_step"]
    chosen = checkpoint_path(folder, best) if best else newest
    if not chosen.is_dir():
        if latest_checkpoint(folder) != newest:  # a run that goes on has saved another one
            return result_checkpoint(folder, notify)
        notify(Status("note", f"the best checkpoint, {chosen.name}, is not there: {newest.name} is used"))
        chosen = newest
    return verified(chosen, [WEIGHTS, STATE])
