"""The files of an export, and that it is whole or absent."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import talik
from talik.base.errors import SourceError, TalikError, UsageError
from talik.base.files import finished_folder, read_json, write_json
from talik.model.source.older_readers import older_tokenizer
from talik.model.source.source import find_model
from talik.model.tokenizer import load_tokenizer
from talik.training.run.checkpoints import latest_checkpoint
from talik.training.run.folder import check_new

exports: Any = importlib.import_module("talik.exporting.whole")
KEPT = [
    "LICENSE",
    "NOTICE",
    "preprocessor_config.json",
    "processor_config.json",
    "tekken.json",
    "params.json",
]
KEPT += ["own.tiktoken", "bpe.codes", "video_preprocessor_config.json", "USE_POLICY.md"]
GONE = ["rows.jsonl", "modeling_own.py", "pytorch_model.bin", "model.gguf", ".gitattributes"]


def trained(source: Path, rows: Path, run: Path, **fields: Any) -> Path:
    recipe = talik.Recipe(
        model=str(source), data=str(rows), top_layers=1, precision="fp32", steps=1, **fields
    )
    talik.train(recipe, run)
    return run


@pytest.fixture
def source(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be changed."""
    return Path(shutil.copytree(model_folder, tmp_path / "source"))


def left_overs(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".part" in path.name]


def test_every_file_that_belongs_to_the_model_is_in_the_export(
    source: Path, rows: Path, tmp_path: Path
) -> None:
    for name in KEPT + GONE:
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (source / "onnx").mkdir()
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer_x").symlink_to(tmp_path / "secret")
    config = read_json(source / "config.json") | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    write_json(source / "config.json", config)
    run = trained(source, rows, tmp_path / "run")
    said: list[Any] = []
    talik.export(run, tmp_path / "out", notify=said.append)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(KEPT) <= found and not found & {*GONE, "onnx", "tokenizer_x", ".checkpoint"}
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert "auto_map" not in read_json(tmp_path / "out" / "config.json")
    (line,) = [event.text for event in said if "not copied" in getattr(event, "text", "")]
    assert all(name in line for name in ("modeling_own.py", "onnx", "tokenizer_x")) and "LICENSE" not in line


def test_the_template_that_trained_is_the_only_one(source: Path, rows: Path, tmp_path: Path) -> None:
    """Older readers take that of tokenizer_config.json, newer ones chat_template.jinja."""
    template = load_tokenizer(source).chat_template
    config = read_json(source / "tokenizer_config.json")
    write_json(source / "tokenizer_config.json", {**config, "chat_template": "{{ 'another' }}"})
    write_json(source / "chat_template.json", {"chat_template": "{{ 'a third' }}"})
    assert load_tokenizer(source).chat_template == template
    talik.export(trained(source, rows, tmp_path / "run"), tmp_path / "out")
    assert read_json(tmp_path / "out" / "tokenizer_config.json")["chat_template"] == template
    assert read_json(tmp_path / "out" / "chat_template.json")["chat_template"] == template


def test_the_template_of_chat_template_json_is_found(source: Path, rows: Path, tmp_path: Path) -> None:
    template = load_tokenizer(source).chat_template
    (source / "chat_template.jinja").unlink()
    write_json(source / "chat_template.json", {"chat_template": template})
    assert load_tokenizer(source).chat_template == template
    talik.export(trained(source, rows, tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    (source / "chat_template.json").write_text("[]")
    with pytest.raises(SourceError, match="holds no template"):
        load_tokenizer(source)


def test_an_adapter_has_template_tokenizer_and_end(source: Path, rows: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").unlink()
    run = trained(source, rows, tmp_path / "run", lora="rank=2")
    talik.export(run, tmp_path / "out", adapter=True)
    assert "Assistant:" in load_tokenizer(tmp_path / "out").chat_template
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [2]
    assert "chat template" in (tmp_path / "out" / "README.md").read_text()


def test_a_tokenizer_class_that_older_readers_know() -> None:
    config = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}
    assert older_tokenizer(config, fast=True) == expected
    named = {"extra_special_tokens": {"image": "<i>"}}
    assert older_tokenizer(named, fast=True) == named


def test_a_config_in_the_older_style_stays_as_it_is(source: Path, rows: Path, tmp_path: Path) -> None:
    config = read_json(source / "config.json")
    for name in ("rope_parameters", "dtype"):
        config.pop(name)
    config |= {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "made_by": "somebody"}
    write_json(source / "config.json", config | {"auto_map": {"AutoConfig": "x.Y"}})
    talik.export(trained(source, rows, tmp_path / "run"), tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json") == {**config, "torch_dtype": "float32"}


@pytest.mark.parametrize("text", ["[]", "null", "", "1.5", "[" * 10**5, '{"cache_implementation": "evil"}'])
def test_a_broken_generation_config_is_told_before_training(text: str, source: Path) -> None:
    (source / "generation_config.json").write_text(text)
    with pytest.raises(SourceError, match="Transformers does not accept it") as caught:
        find_model(str(source))
    assert "generation_config.json" in str(caught.value)


def test_sampling_defaults_are_kept(source: Path, rows: Path, tmp_path: Path) -> None:
    write_json(source / "generation_config.json", {"eos_token_id": 5, "temperature": 0.6, "do_sample": True})
    talik.export(trained(source, rows, tmp_path / "run"), tmp_path / "out")
    written = read_json(tmp_path / "out" / "generation_config.json")
    assert written == {"eos_token_id": [5, 2], "temperature": 0.6, "do_sample": True}


@pytest.mark.parametrize(
    "error", [TalikError("differs"), KeyError("metadata"), KeyboardInterrupt(), MemoryError()]
)
def test_an_export_that_fails_late_leaves_nothing(
    error: BaseException, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(exports, "verify_logits", fail)
    with pytest.raises(type(error)):
        talik.export(run_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_place(run_folder: Path, tmp_path: Path) -> None:
    """One of them is whole, the other says why it is not."""
    command = [sys.executable, "-m", "talik.cli", "export", str(run_folder), str(tmp_path / "out")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    assert any("exists already" in error for error in errors)
    assert not any("Traceback" in error for error in errors)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= names
    assert not left_overs(tmp_path)


def test_a_run_that_goes_on_may_remove_its_checkpoint(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    write = exports._write_whole

    def removing(*arguments: Any) -> Any:
        checkpoint = latest_checkpoint(run)
        assert checkpoint is not None
        shutil.rmtree(checkpoint.parent)
        return write(*arguments)

    monkeypatch.setattr(exports, "_write_whole", removing)
    talik.export(run, tmp_path / "out")
    assert not (tmp_path / "out" / ".checkpoint").exists()


def test_parts_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    gone, alive = tmp_path / ".out.99999999-abcdef.part", tmp_path / f".out.{os.getpid()}-abcdef.part"
    for part in (gone, alive):
        part.mkdir()
    with finished_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert not gone.exists() and alive.exists() and (tmp_path / "out" / "x").exists()


@pytest.mark.parametrize(
    "check", [check_new, lambda path: exports.check_destination(Path("elsewhere"), path)]
)
def test_places_where_no_folder_can_be_made(
    check: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is the current folder"):
        check(Path())
    (tmp_path / "volume").mkdir()
    check(Path("volume"))
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(UsageError, match=r"is a mount point\n.*volume"):
        check(Path("volume"))
    with pytest.raises(UsageError, match="cannot be used"):
        check(Path("x" * 300))


def test_a_long_name_can_be_made(tmp_path: Path) -> None:
    with finished_folder(tmp_path / ("x" * 250)) as folder:
        (folder / "file").write_text(json.dumps(1))
    assert (tmp_path / ("x" * 250) / "file").exists()
