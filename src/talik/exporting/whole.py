"""Exports a run as a plain Transformers folder: untouched tensors are copied, changed ones are written.

One tensor is in memory at a time. The folder appears once it is complete and verified.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from talik.base.errors import RunError, TalikError, UsageError
from talik.base.events import Notify, Status, silent
from talik.base.files import check_folder_place, finished_folder, need_room, write_json
from talik.exporting.adapters import Merged, Named, write_adapter
from talik.exporting.card import model_card
from talik.exporting.check import verify_logits
from talik.exporting.config import exported_config
from talik.exporting.files import write_companions
from talik.model.anatomy import parts_of
from talik.model.folder import ModelFolder
from talik.model.weights.conversion import in_checkpoint
from talik.model.weights.safetensors_file import (
    Entry,
    copy_bytes,
    pieces,
    read_header,
    tensor_bytes,
    write_tensors,
)
from talik.training.loading import working_dtype
from talik.training.run.folder import Run, open_run, result_checkpoint

HOLDS = 20  # attempts to link a checkpoint while its run saves others


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export.

    Attributes:
        folder: The exported folder.
        changed: Tensors with trained values.
        copied: Tensors copied byte by byte.
        converted: Tensors converted to another dtype.
        added: Tensors that the source does not have.
        size: Bytes of all tensors.
    """

    folder: Path
    changed: int
    copied: int
    converted: int
    added: int
    size: int


def export(run: str | Path, out: str | Path, *, adapter: bool = False, notify: Notify = silent) -> Exported:
    """Exports the result of a run as a plain Transformers folder. The base model is not changed.

    Adapters are merged into the weights, or written as a PEFT folder. The export is verified by names, shapes
    and bytes, and by its logits against the tuned model if there is memory for it.

    Args:
        run: The run folder.
        out: A folder that is new or empty.
        adapter: Write the adapters as a PEFT folder.
        notify: Gets the events.

    Raises:
        UsageError: `out` is in use, or the run trained no adapters.
        RunError: The run has no checkpoint.
        NoRoomError: The disk has too little room.
        TalikError: Verification failed.
    """
    opened, out = open_run(run, notify), Path(out)
    recipe, source = opened.recipe, opened.source.folder
    check_destination(source, out)
    if adapter and recipe.lora is None:
        raise UsageError("--adapter: this run trained no adapters", where=opened.folder)
    with finished_folder(out) as folder, _held(opened.folder, folder, notify) as checkpoint:
        if adapter:
            card = model_card(opened, checkpoint, adapter=True)
            exported = Exported(out, 0, 0, 0, 0, write_adapter(opened, checkpoint, folder, card, notify))
            whole = sum(entry.size for table in opened.model.tables.values() for entry in table.values())
        else:
            exported = _write_whole(opened, checkpoint, folder, out, notify)
            whole = exported.size
        notify(Status("export", verify_logits(opened, checkpoint, folder, whole, adapter=adapter)))
    return exported


@contextlib.contextmanager
def _held(run: Path, folder: Path, notify: Notify) -> Iterator[Path]:
    """Links the checkpoint under a second name, so that it survives if the run deletes its own."""
    held = folder / ".checkpoint"
    for _ in range(HOLDS):
        shutil.rmtree(held, ignore_errors=True)
        try:
            checkpoint = result_checkpoint(run, notify)
            shutil.copytree(checkpoint, held / checkpoint.name, copy_function=_linked)
            break
        except (FileNotFoundError, shutil.Error):  # the run has just saved another one
            continue
    else:
        problem = "saves checkpoints faster than they can be read"
        raise RunError(problem, where=run, remedy="Try again when the run has ended.")
    yield held / checkpoint.name
    shutil.rmtree(held)


def _linked(source: str, target: str) -> str:
    """Makes a hard link to a file, or a copy if the file system has no links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
    return target


def _write_whole(run: Run, checkpoint: Path, folder: Path, out: Path, notify: Notify) -> Exported:
    """Writes the source model with the trained tensors and reports how many tensors changed."""
    dtype, untied = working_dtype(run.recipe), run.recipe.thawed(run.plan.layers).unties

    def trained(named: Named) -> Mapping[str, Tensor]:
        if run.recipe.lora is not None:
            return Merged(run, checkpoint, named)
        return named(load_file(checkpoint / "weights.safetensors"))

    card = model_card(run, checkpoint)
    exported = write_model(run.model, trained, folder, dtype, untied=untied, out=out)
    write_companions(run.model, folder, card, notify)
    notify(
        Status(
            "export",
            f"{exported.changed} tensors changed, {exported.copied} copied, {exported.converted} converted "
            f"to {str(dtype).removeprefix('torch.')}, {exported.added} added; every byte compared",
        )
    )
    if untied and exported.added:
        notify(Status("export", "the head was tied to the embeddings and has weights of its own now"))
    return exported


def check_destination(source: Path, out: Path) -> None:
    """Raises UsageError if `out` is not empty, is in the source's folder, or cannot be made."""
    check_folder_place(out)
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        problem = "is in the folder of the source model, which stays as it is"
        raise UsageError(problem, where=out, remedy="Name a folder that is new or empty.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("exists already", where=out, remedy="Name a folder that is new or empty.")


def write_model(
    source: ModelFolder,
    trained: Callable[[Named], Mapping[str, Tensor]],
    folder: Path,
    dtype: torch.dtype,
    *,
    untied: bool,
    out: Path,
) -> Exported:
    """Writes weights and config of the source model with the trained tensors, and reads them back.

    Args:
        source: The model that was trained.
        trained: Returns the trained tensors by their names in the source's files. Its argument maps names and
            shapes of the model to those in the files.
        folder: An existing, empty folder to write to.
        dtype: The dtype of every floating-point tensor.
        untied: Whether the head has weights of its own now.
        out: The final name of the folder.

    Raises:
        NoRoomError: The disk has too little room.
        TalikError: A tensor was written wrongly, or has no place in the source's files.
    """
    fields = exported_config(source, dtype, untied=untied)
    config = copy.deepcopy(source.config)
    config.dtype = dtype
    if untied:
        config.get_text_config(decoder=True).tie_word_embeddings = config.tie_word_embeddings = False
    tables = source.tables
    known = {name for table in tables.values() for name in table}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    delta = trained(lambda tensors: in_checkpoint(model, tensors, known, source.path))
    head = parts_of(model).head
    added = {name: delta[name] for name in delta.keys() - known}
    if strange := sorted(added.keys() - ({f"{head}.weight"} if untied else set())):
        raise TalikError(f"{len(strange)} trained tensors have no place in the checkpoint: {strange[:5]}")
    dtypes = Dtypes(dtype, model)
    size = sum(_size(n, e, dtypes) for table in tables.values() for n, e in table.items())
    need_room(out, size, "export")
    for number, (file, table) in enumerate(tables.items()):
        extra = added if number == len(tables) - 1 else {}
        _write_file(folder / file.name, table, delta, extra, dtypes)
    _write_index(folder, tables, added)
    write_json(folder / "config.json", fields)
    return _verify(folder, tables, delta, dtypes, out)


class Dtypes:
    """The dtype of each floating-point tensor: the run's, or fp32 if the model's class requires it."""

    def __init__(self, dtype: torch.dtype, model: PreTrainedModel) -> None:
        self._dtype = dtype
        kept = sorted(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        self._kept = re.compile(rf"(^|\.)({'|'.join(map(re.escape, kept)) or '(?!)'})($|\.)")

    def of(self, name: str, entry: Entry) -> torch.dtype:
        if not entry.dtype.is_floating_point:
            return entry.dtype
        return torch.float32 if self._kept.search(name) else self._dtype


def _size(name: str, entry: Entry, dtypes: Dtypes) -> int:
    return torch.Size(entry.shape).numel() * dtypes.of(name, entry).itemsize


def _write_file(
    path: Path,
    table: dict[str, Entry],
    delta: Mapping[str, Tensor],
    added: dict[str, Tensor],
    dtypes: Dtypes,
) -> None:
    """Writes one weight file: the source's tensors in their order, changed ones replaced, new ones at the
    end.
    """
    with path.open("wb") as file:
        rows = [(name, dtypes.of(name, entry), entry.shape) for name, entry in table.items()]
        rows += [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in added.items()]
        write_tensors(file, rows)
        for name, entry in table.items():
            if name in delta:
                file.write(tensor_bytes(delta[name]))
            elif entry.dtype == dtypes.of(name, entry):
                copy_bytes(entry, file)
            else:
                file.write(tensor_bytes(entry.read().to(dtypes.of(name, entry))))
        for tensor in added.values():
            file.write(tensor_bytes(tensor))


def _write_index(folder: Path, tables: dict[Path, dict[str, Entry]], added: dict[str, Tensor]) -> None:
    """Writes the index of a model in several files; a model in one file needs none."""
    files = list(tables)
    if [file.name for file in files] == ["model.safetensors"]:
        return
    places = {name: file.name for file, table in tables.items() for name in table}
    places |= dict.fromkeys(added, files[-1].name)
    size = sum(entry.size for file in files for entry in read_header(folder / file.name).values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))},
    )


def _verify(
    folder: Path,
    tables: dict[Path, dict[str, Entry]],
    delta: Mapping[str, Tensor],
    dtypes: Dtypes,
    out: Path,
) -> Exported:
    """Reads every tensor back and compares names, shapes and bytes; raises TalikError for a difference."""
    written = {name: entry for file in tables for name, entry in read_header(folder / file.name).items()}
    source = {name: entry for table in tables.values() for name, entry in table.items()}
    if written.keys() != source.keys() | delta.keys():
        raise TalikError(f"the export lacks {sorted((source.keys() | delta.keys()) - written.keys())[:5]}")
    copied = converted = 0
    for name, entry in written.items():
        if name in delta:
            same = entry.shape == tuple(delta[name].shape) and bytes(tensor_bytes(delta[name])) == b"".join(
                pieces(entry)
            )
        elif source[name].dtype == entry.dtype:
            copied += 1
            pairs = zip(pieces(entry), pieces(source[name]), strict=True)
            same = entry.shape == source[name].shape and all(a == b for a, b in pairs)
        else:
            converted += 1
            same = torch.equal(entry.read(), source[name].read().to(dtypes.of(name, source[name])))
        if not same:
            raise TalikError(f"{name} was written wrongly; nothing is kept", where=out)
    size = sum(entry.size for entry in written.values())
    return Exported(
        out, len(delta.keys() & source.keys()), copied, converted, len(delta.keys() - source.keys()), size
    )
