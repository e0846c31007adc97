"""The run folder: recipe.yaml, plan.json, source.json, metrics.jsonl, results.json, log.txt, checkpoints."""

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

FILES = ("recipe.yaml", "plan.json", "source.json")  # a folder with these files is a run
REFUSED = "refused.json"


@dataclass(frozen=True, slots=True)
class Run:
    """The content of a run folder, and the model that the run began with."""

    folder: Path
    recipe: Recipe
    plan: Plan
    source: Source
    model: ModelFolder
    date: str | None = None  # the date that the chat template writes as today's


def is_run(path: str | Path) -> bool:
    """True if a path is a run folder."""
    return (Path(path) / "recipe.yaml").is_file()


def check_new(folder: Path) -> None:
    """Raises RunError if the folder is not empty or cannot be created."""
    if blocked := next((parent for parent in folder.parents if parent.is_file()), None):
        problem = f"cannot be used: Not a directory: {blocked}"
        raise RunError(problem, where=folder, remedy="Name another place.")
    check_folder_place(folder)
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {REFUSED}):
        remedy = f"Continue it: talik resume {quoted(folder)}\n  Or choose" if is_run(folder) else "Choose"
        raise RunError(
            "the folder exists already", where=folder, remedy=f"{remedy} a folder that is new or empty."
        )


def start_run(
    folder: Path,
    recipe: Recipe,
    plan: Plan,
    source: Source,
    model: ModelFolder,
    data: str,
    date: str | None = None,
) -> Run:
    """Creates the folder with recipe, plan and source, completely or not at all.

    `data` is the hash of the examples.
    """
    known = {
        "folder": str(source.folder.resolve()),
        "origin": source.origin,
        "kind": source.kind,
        "revision": source.revision,
        "weights": weights_fingerprint(source.folder),
        "examples": data,
        "date": date,
    }
    check_new(folder)  # again: another run may have started in it while this one was planned
    (folder / REFUSED).unlink(missing_ok=True)
    with finished_folder(folder) as part:
        write_json(part / "source.json", known)
        write_json(part / "plan.json", plan.model_dump())
        write_recipe(recipe, part / "recipe.yaml")
    return Run(folder, recipe, plan, source, model, date)


def refuse_run(folder: Path, recipe: Recipe, planned: dict[str, Any]) -> None:
    """Writes why a run was refused into the folder it would have used; another run may still start there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REFUSED, {"recipe": recipe.model_dump(), "planned": planned})


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder. RunError if another process works on the run."""
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(
            "another process works on this run", where=folder, remedy="Wait until it ends."
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_same_data(run: Run, data: str) -> None:
    """Raises RunError if the examples differ from those that the run began with."""
    known = read_json(run.folder / "source.json")
    if "examples" not in known:
        problem = "this run began with an earlier version of Talik, which identified its examples differently"
        remedy = "Continue with the version that the run began with, or start a new run."
        raise RunError(problem, where=run.folder, remedy=remedy)
    if known["examples"] != data:
        raise RunError(
            "the examples of these data are not those that this run began with",
            where=run.folder,
            remedy="Put the former data, tokenizer and chat template back, or start a new run.",
        )


def open_run(folder: str | Path, notify: Notify) -> Run:
    """Opens a run that was started.

    Raises:
        RunError: The folder is not a run folder, or the weights of its model have changed.
    """
    folder = Path(folder)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        problem = (
            f"this is not a run folder: {', '.join(missing)} missing"
            if folder.exists()
            else "there is no such folder"
        )
        raise RunError(problem, where=folder, remedy="Give the folder that was given to `talik train -o`.")
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
            remedy="Put the former weights back, or start a new run: talik train",
        )
    return Run(folder, recipe, plan, source, ModelFolder.of(source), known.get("date"))


def result_checkpoint(folder: Path, notify: Notify = silent) -> Path:
    """Returns the checkpoint with the result of a run: the best one if it was evaluated, else the newest.

    The checkpoint is verified. If the best one was removed (because it was damaged, for example), `notify`
    receives a note, and the newest is used.

    Raises:
        RunError: There is no checkpoint yet, or it is damaged.
    """
    newest = latest_checkpoint(folder)
    if newest is None:
        raise RunError(
            "this run has no checkpoint yet",
            where=folder,
            remedy=f"Continue it: talik resume {quoted(folder)}",
        )
    best = read_json(verified(newest, [STATE]) / STATE)["best_step"]
    chosen = checkpoint_path(folder, best) if best else newest
    if not chosen.is_dir():
        if latest_checkpoint(folder) != newest:  # the run continues and has saved another one
            return result_checkpoint(folder, notify)
        notify(Status("note", f"the best checkpoint, {chosen.name}, was removed: {newest.name} is used"))
        chosen = newest
    return verified(chosen, [WEIGHTS, STATE])
