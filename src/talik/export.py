"""A run's result as a plain Transformers folder: untouched tensors are copied, changed ones are written.

The model is never held: one tensor at a time. The folder appears once it is complete and verified.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from talik.card import model_card
from talik.data.facts import stops_of
from talik.data.template import plain_template
from talik.errors import TalikError, UsageError
from talik.events import Notify, Said, silent
from talik.export_adapters import Merged, Named, export_adapter
from talik.export_check import verify_logits
from talik.files import finished_folder, need_room, read_json, write_json, write_text
from talik.model.anatomy import parts_of
from talik.model.checkpoint import (
    Entry,
    copy_bytes,
    pieces,
    read_header,
    read_tables,
    tensor_bytes,
    write_tensors,
)
from talik.model.conversion import in_checkpoint
from talik.train.loading import working_dtype
from talik.train.run_folder import Run, load_tokenizer, open_run, result_checkpoint

TOKENIZER = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model")
TEMPLATE = ("*.jinja", "chat_template*", "additional_chat_templates/*")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: tensors changed, copied, converted to another dtype, added; bytes in all."""

    folder: Path
    changed: int
    copied: int
    converted: int
    added: int
    size: int


def export(run: str | Path, out: str | Path, *, adapter: bool = False, notify: Notify = silent) -> Exported:
    """Writes a run's result as a plain Transformers folder; the base model stays as it is.

    Adapters are merged into the weights, or, with `adapter`, written by themselves as a folder of PEFT.

    Verified by names, shapes and bytes, and by logits against the tuned model where there is memory for it.
    Raises UsageError for a folder that is taken, RunError for a run without a checkpoint, NoRoomError, and
    TalikError if what was written is not what should have been.
    """
    opened, out = open_run(run, notify), Path(out)
    recipe, source = opened.recipe, opened.source.folder
    check_destination(source, out)
    if adapter and recipe.lora is None:
        raise UsageError("--adapter: this run trained no adapters", where=opened.folder)
    checkpoint = result_checkpoint(opened.folder)
    if adapter:
        card = model_card(opened, checkpoint, adapter=True)
        exported = Exported(out, 0, 0, 0, 0, export_adapter(opened, checkpoint, out, card))
        whole = sum(entry.size for table in read_tables(source).values() for entry in table.values())
    else:
        exported = _export_whole(opened, checkpoint, out, notify)
        whole = exported.size
    try:
        notify(Said("export", verify_logits(opened, checkpoint, out, whole, adapter=adapter)))
    except TalikError:
        shutil.rmtree(out)
        raise
    return exported


def _export_whole(run: Run, checkpoint: Path, out: Path, notify: Notify) -> Exported:
    """The source model with what was trained in it; says how many tensors that concerned."""
    dtype, untied = working_dtype(run.recipe), run.recipe.thawed(run.plan.layers).unties

    def trained(named: Named) -> Mapping[str, Tensor]:
        if run.recipe.lora is not None:
            return Merged(run, checkpoint, named)
        return named(load_file(checkpoint / "weights.safetensors"))

    card = model_card(run, checkpoint)
    exported = export_folder(run.source.folder, trained, out, dtype, untied=untied, card=card)
    notify(
        Said(
            "export",
            f"{exported.changed} tensors changed, {exported.copied} copied, {exported.converted} converted "
            f"to {str(dtype).removeprefix('torch.')}, {exported.added} added; every byte compared",
        )
    )
    if untied and exported.added:
        notify(Said("export", "the head was tied to the embeddings and has weights of its own now"))
    return exported


def check_destination(source: Path, out: Path) -> None:
    """UsageError if `out` is the source's folder, inside it, or has something in it."""
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        problem = "is in the folder of the source model, which stays as it is"
        raise UsageError(problem, where=out, remedy="Name a folder that is new or empty.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("exists already", where=out, remedy="Name a folder that is new or empty.")


def export_folder(
    source: Path,
    trained: Callable[[Named], Mapping[str, Tensor]],
    out: Path,
    dtype: torch.dtype,
    *,
    untied: bool,
    card: str,
) -> Exported:
    """Writes the source model with the trained tensors in it.

    `trained` gives them by their names in the checkpoint, and is given what turns the model's names and
    shapes into those. Every floating tensor gets the run's `dtype`. `untied`: the head has weights of its own
    now. Raises UsageError for a destination that is taken, NoRoomError, and TalikError if what was written is
    not what should have been.
    """
    check_destination(source, out)
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    if untied:
        config.get_text_config(decoder=True).tie_word_embeddings = False
        config.tie_word_embeddings = False
    config.dtype = dtype
    tables = read_tables(source)
    known = {name for table in tables.values() for name in table}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    delta = trained(lambda tensors: in_checkpoint(model, tensors, known, source))
    head = parts_of(model).head
    added = {name: delta[name] for name in delta.keys() - known}
    if strange := sorted(added.keys() - ({f"{head}.weight"} if untied else set())):
        raise TalikError(f"{len(strange)} trained tensors have no place in the checkpoint: {strange[:5]}")
    dtypes = Dtypes(dtype, model)
    need_room(out, sum(_size(n, e, dtypes) for table in tables.values() for n, e in table.items()), "export")
    if out.exists():
        out.rmdir()  # empty, checked above
    with finished_folder(out) as folder:
        for number, (file, table) in enumerate(tables.items()):
            extra = added if number == len(tables) - 1 else {}
            _write_file(folder / file.name, table, delta, extra, dtypes)
        _write_index(folder, tables, added)
        _write_rest(source, folder, config, card)
        return _verify(folder, tables, delta, dtypes, out)


class Dtypes:
    """The dtype of each floating tensor: the run's, or fp32 where the model's class insists on it."""

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
    """One weight file: the source's tensors in their order, changed ones replaced, added ones behind."""
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
    """The index of a model in several files; a model in one file has none."""
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


def _write_rest(source: Path, folder: Path, config: PreTrainedConfig, card: str) -> None:
    """Config, generation config, tokenizer, chat template and the card."""
    config.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        shutil.copy2(source / "generation_config.json", folder)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    for pattern in (*TOKENIZER, *TEMPLATE):
        for file in source.glob(pattern):
            if file.is_file():
                place = folder / file.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                shutil.copy2(file, place)
    tokenizer = load_tokenizer(source)
    # The tuned model ends its turns as it was trained to.
    generation = read_json(folder / "generation_config.json")
    stops = stops_of(tokenizer, generation.get("eos_token_id"))
    generation["eos_token_id"] = list(stops.ids)
    if stops.texts:
        generation["stop_strings"] = list(stops.texts)
    write_json(folder / "generation_config.json", generation)
    if tokenizer.chat_template is None:  # what it was trained with must be what it is asked with
        write_text(folder / "chat_template.jinja", plain_template(tokenizer))
    write_text(folder / "README.md", card)


def _verify(
    folder: Path,
    tables: dict[Path, dict[str, Entry]],
    delta: Mapping[str, Tensor],
    dtypes: Dtypes,
    out: Path,
) -> Exported:
    """Reads every tensor back: names, shapes and bytes. TalikError where one is not what it should be."""
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
