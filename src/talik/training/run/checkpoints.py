"""Checkpoints: the trained weights, the optimizer's state, and the progress of the run; never the trunk.

A checkpoint is a folder such as `step-00000040` that appears once it is complete. Random generators are
seeded in every step from the seed and the number of the step, and the order of the data follows from the
seed and the epoch. So a few integers are the only state in addition to the tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from talik.base.errors import RunError
from talik.base.files import finished_folder, need_room, read_json, sync_folder
from talik.model.weights.safetensors_file import read_header, tensor_bytes, write_tensors
from talik.recipe.recipe import Recipe
from talik.training.memory.keys import NORM, Key
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store
from talik.training.run.checkpoint_digests import OPTIMIZER, STATE, WEIGHTS, DigestWriter
from talik.training.step.gradients import block_loaded
from talik.training.step.top import Top
from talik.training.step.update import needs_global_norm, state_forms


@dataclass(slots=True)
class RunState:
    """The progress of a run: `step` steps are done; `epoch` and `step_in_epoch` are those of the next one."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0  # evaluations since the best one
    evaluations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def clear_unfinished(run: Path) -> None:
    """Removes incomplete checkpoints of a killed process."""
    for part in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(part)


def checkpoint_path(run: Path, step: int) -> Path:
    """The folder of the checkpoint after a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def _state_keys(top: Top, recipe: Recipe) -> list[Key]:
    last = [NORM] if recipe.clip == "last" else []
    return [*last, *(key for name, own in top.parameters() for key in state_forms(name, own, recipe))]


def checkpoints_at_once(recipe: Recipe) -> int:
    """The most checkpoints of a run on disk: those to keep, the best one, and one being written."""
    return recipe.keep + 2


def checkpoint_bytes(trained: dict[str, nn.Parameter], recipe: Recipe) -> int:
    """The most bytes that the checkpoints of a run take: those to keep, the best, and one being written."""
    weights = sum(parameter.nbytes for parameter in trained.values())
    return (weights + state_bytes(trained, recipe)) * checkpoints_at_once(recipe)


def state_bytes(trained: dict[str, nn.Parameter], recipe: Recipe) -> int:
    """The bytes of masters and optimizer state of these parameters."""
    forms = (form for name, own in trained.items() for form in state_forms(name, own, recipe).values())
    return sum(shape.numel() * dtype.itemsize for shape, dtype in forms)


def scratch_bytes(trained: dict[str, nn.Parameter], recipe: Recipe) -> int:
    """The bytes of masters, optimizer state, and gradients that are pending for exact clipping."""
    gradients = 4 * sum(parameter.numel() for parameter in trained.values())
    return state_bytes(trained, recipe) + (gradients if needs_global_norm(recipe) else 0)


def save_checkpoint(
    run: Path, top: Top, store: Store, scratch: Scratch, recipe: Recipe, state: RunState
) -> Path:
    """Writes a checkpoint unless it exists, then removes old ones (`recipe.keep`, and the best stay).

    It is written block by block and tensor by tensor, so that it takes no memory.
    """
    path = checkpoint_path(run, state.step)
    if not path.exists():
        optimizer = {str(key): scratch[key] for key in _state_keys(top, recipe)}
        size = sum(parameter.nbytes for _, parameter in top.parameters())
        need_room(path.parent, size + sum(t.nbytes for t in optimizer.values()), "a checkpoint")
        with finished_folder(path) as folder:
            _write_files(folder, top, store, optimizer, state)
        sync_folder(path.parent)  # before an older one is removed
    best = None if state.best_step is None else checkpoint_path(run, state.best_step)
    for old in checkpoints(run)[: -recipe.keep]:
        if old != best:
            _drop(old)
    return path


def _write_files(folder: Path, top: Top, store: Store, optimizer: dict[str, Tensor], state: RunState) -> None:
    """Writes the files of a checkpoint, the digests last."""
    digests = DigestWriter(folder)
    with digests.file(WEIGHTS) as file:
        table = [(name, parameter.dtype, parameter.shape) for name, parameter in top.parameters()]
        _write(file, table, _trained(top, store))
    with digests.file(OPTIMIZER) as file:
        table = [(name, tensor.dtype, tensor.shape) for name, tensor in optimizer.items()]
        _write(file, table, optimizer.values())
    with digests.file(STATE) as file:
        file.write(json.dumps(asdict(state), indent=2).encode("utf-8"))
    digests.finish()


def _write(file: BinaryIO, table: Iterable[tuple[str, torch.dtype, Any]], tensors: Iterable[Tensor]) -> None:
    write_tensors(file, table)
    for tensor in tensors:
        file.write(tensor_bytes(tensor))


def _drop(checkpoint: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that a kill leaves no partial one under its name."""
    gone = checkpoint.with_name(f".{checkpoint.name}.gone")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _trained(top: Top, store: Store) -> Iterator[Tensor]:
    """Yields the trained weights in the order of `top.parameters`, each while its block is loaded."""
    seen: set[str] = set()
    for block in top.blocks:
        with block_loaded(store, top, block):
            yield from (own for name, own in top.of(block) if name not in seen)
        seen.update(name for name, _ in top.of(block))


def load_checkpoint(path: Path, top: Top, scratch: Scratch) -> RunState:
    """Restores a checkpoint's tensors bit for bit, and returns the progress of the run.

    Streamed weights are read from the checkpoint when their block is loaded (`RunModel.working`).
    """
    load_weights(path, dict(top.parameters()))
    for name, entry in read_header(path / OPTIMIZER).items():
        entry.read_to(scratch[Key.parse(name)])
    return RunState(**read_json(path / STATE))


def load_weights(path: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Reads a checkpoint's trained weights into the parameters of the same names, except for hollow ones.

    The file is read, not mapped: a mapped file would count against a hard memory limit.

    Raises:
        RunError: The checkpoint has other parameters or shapes.
    """
    weights = read_header(path / WEIGHTS)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if {name: entry.shape for name, entry in weights.items()} != shapes:
        raise RunError("the checkpoint was made with other trained layers", where=path)
    for name, entry in weights.items():
        if not parameters[name].is_meta:
            entry.read_to(parameters[name])


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(reversed(checkpoints(run)), None)
