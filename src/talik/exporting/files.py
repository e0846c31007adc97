"""The files of an export other than weights: tokenizer, template, generation config, card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from talik.base.events import Notify, Status
from talik.base.files import read_json, write_json, write_text
from talik.data.templates.template import plain_template
from talik.data.templates.template_facts import Stops, stops_of
from talik.exporting.tokenizer import write_tokenizer
from talik.model.folder import ModelFolder
from talik.model.tokenizer import is_tokenizer_file

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz"),
    *(".index.json", ".tflite", ".mlmodel", ".pdparams", ".ot", ".data", ".safetensors.json"),
)
_DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
_MADE = {"config.json", "generation_config.json", "README.md", "talik_source.json", "adapter_config.json"}


def write_companions(source: ModelFolder, folder: Path, card: str, notify: Notify) -> None:
    """Writes all files of an export except weights and config.json.

    Args:
        source: The model that was trained.
        folder: The folder of the export.
        card: The text of README.md.
        notify: Gets the names of files that are not copied.
    """
    left_out = []
    for path in sorted(source.path.iterdir()):
        if _is_left_out(path, source.path):
            left_out.append(path.name)
        elif path.is_file() and _belongs(path):
            shutil.copy2(path, folder / path.name)
    for path in sorted((source.path / "additional_chat_templates").glob("*.jinja")):
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        shutil.copy2(path, folder / "additional_chat_templates")
    if left_out:
        notify(Status("export", f"not copied from the source: {', '.join(left_out)}"))
    _write_texts(source, folder, card, notify)


def write_adapter_companions(source: ModelFolder, folder: Path, card: str, notify: Notify) -> None:
    """Writes the files that adapters need: tokenizer, chat template, stop tokens, and the card."""
    for path in sorted(source.path.iterdir()):
        if path.is_file() and is_tokenizer_file(path.name) and not _is_left_out(path, source.path):
            shutil.copy2(path, folder / path.name)
    _write_texts(source, folder, card, notify)


def _write_texts(source: ModelFolder, folder: Path, card: str, notify: Notify) -> None:
    """Writes the chat template, the tokenizer, the stop tokens and the card."""
    write_template(source, folder)
    write_tokenizer(folder, source.tokenizer(), notify)
    write_generation_config(source, folder)
    write_text(folder / "README.md", card)


def _belongs(path: Path) -> bool:
    """True for a file of the model that does not hold weights."""
    name = path.name
    return not (name.startswith(".") or name in _MADE or name.endswith((*_WEIGHTS, *_DATA)))


def _is_left_out(path: Path, source: Path) -> bool:
    """True for files that are not copied and reported: code, folders, and links out of the folder."""
    if path.name.startswith(".") or path.name in ("additional_chat_templates", "README.md"):
        return False
    if path.is_dir() or path.suffix == ".py" or path.name.endswith(_DATA):
        return True
    if path.name.endswith(_WEIGHTS):
        return False
    real, home = path.resolve(), source.resolve()
    cache = home.parents[1] if home.parent.name == "snapshots" else home  # a hub's cache: links to its blobs
    return not real.is_relative_to(home) and not real.is_relative_to(cache)


def write_template(source: ModelFolder, folder: Path) -> None:
    """Writes the chat template of the training to every place of the export that holds one.

    A tokenizer without a template gets the plain template that it was trained with.
    """
    tokenizer = source.tokenizer()
    template = tokenizer.chat_template
    if template is None:
        write_text(folder / "chat_template.jinja", plain_template(tokenizer))
    for name in ("tokenizer_config.json", "chat_template.json"):
        file = folder / name
        fields = read_json(file) if isinstance(template, str) and file.is_file() else {}
        if isinstance(fields.get("chat_template"), str) and fields["chat_template"] != template:
            write_json(file, {**fields, "chat_template": template})


def write_generation_config(source: ModelFolder, folder: Path) -> None:
    """Writes generation_config.json: the source's values with all stop tokens of the training."""
    file = source.path / "generation_config.json"
    if file.is_file():
        generation: dict[str, Any] = read_json(file)
    else:
        generation = GenerationConfig.from_model_config(source.config).to_diff_dict()
    stops: Stops = stops_of(source.tokenizer(), generation.get("eos_token_id"))
    generation["eos_token_id"] = list(stops.ids)
    if stops.texts:
        known = generation.get("stop_strings") or []
        known = [known] if isinstance(known, str) else known
        generation["stop_strings"] = list(dict.fromkeys([*known, *stops.texts]))
    write_json(folder / "generation_config.json", generation)
