"""Digests of checkpoints: damaged, missing and foreign files are named, and the checkpoint is not used."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import talik
from talik.base.errors import RunError
from talik.base.events import Status
from talik.base.files import read_json
from talik.chat import load_for_chat
from talik.model.folder import ModelFolder
from talik.plan.ways import choose
from talik.recipe.recipe import Recipe
from talik.training.run import checkpoint_digests
from talik.training.run.checkpoint_digests import DIGESTS, FILES, STATE, WEIGHTS, DigestWriter, verified
from talik.training.run.checkpoints import checkpoints, latest_checkpoint
from talik.training.run.folder import result_checkpoint


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, which the test may damage."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def flip_a_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-7] ^= 16
    file.write_bytes(raw)


def newest(run: Path) -> Path:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def with_another(run: Path, step: int = 1) -> Path:
    """Adds an older checkpoint to the run."""
    return Path(shutil.copytree(newest(run), newest(run).with_name(f"step-{step:08d}")))


def set_state(checkpoint: Path, **fields: Any) -> None:
    """Changes the state of a checkpoint as if it had been saved so."""
    state = {**read_json(checkpoint / STATE), **fields}
    (checkpoint / STATE).write_text(json.dumps(state))
    digest = hashlib.sha256((checkpoint / STATE).read_bytes()).hexdigest()
    (checkpoint / DIGESTS).write_text(json.dumps({**read_json(checkpoint / DIGESTS), STATE: digest}))


def refusal(checkpoint: Path) -> str:
    with pytest.raises(RunError) as caught:
        verified(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint}: ")
    return str(caught.value)


# Writing


def test_every_checkpoint_has_the_digests_of_its_files(run: Path) -> None:
    for checkpoint in checkpoints(run):
        known = read_json(checkpoint / DIGESTS)
        assert known.keys() == set(FILES) == {path.name for path in checkpoint.iterdir()} - {DIGESTS}
        for name, digest in known.items():
            assert digest == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()


def test_a_digest_is_that_of_the_bytes_passed_to_write(tmp_path: Path) -> None:
    """The file is not read back for its digest, so a bit that flips on the way to the disk is detected."""
    writer = DigestWriter(tmp_path)
    for name in FILES:
        with writer.file(name) as file:
            file.write(b"as it should be")
            file.write(memoryview(b", in two parts"))
    (tmp_path / WEIGHTS).write_bytes(b"as it should bf, in two parts")
    writer.finish()
    assert "weights.safetensors is damaged" in refusal(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"as it should be, in two parts")
    assert verified(tmp_path) == tmp_path


def test_an_old_checkpoint_is_removed_at_once(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed while it removes a checkpoint has no partial checkpoint under its name."""
    fields = {"precision": "fp32", "thaw": "norm", "batch_tokens": 200, "steps": 2, "save_every": 1}
    recipe = Recipe.model_validate({"model": str(model_folder), "data": str(rows), **fields})

    def killed(folder: Path) -> None:
        next(folder.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, **_: "step-" in str(folder) and killed(folder))
        with pytest.raises(KeyboardInterrupt):
            talik.train(recipe, tmp_path / "run", plan=choose(recipe, ModelFolder(model_folder)))
    assert [verified(path).name for path in checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert list((tmp_path / "run" / "checkpoints").glob(".step-*"))
    talik.resume(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))


# Verification


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_detected(name: str, run: Path) -> None:
    checkpoint = verified(newest(run))
    written = read_json(checkpoint / DIGESTS)[name]
    flip_a_bit(checkpoint / name)
    found = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    assert f"{name} is damaged: its SHA-256 is {found} instead of {written}" in refusal(checkpoint)


def test_all_damage_is_named_at_once(run: Path) -> None:
    checkpoint = newest(run)
    flip_a_bit(checkpoint / WEIGHTS)
    (checkpoint / "optimizer.safetensors").unlink()
    (checkpoint / "notes.txt").write_text("mine")
    text = refusal(checkpoint)
    assert "3 problems" in text and "weights.safetensors is damaged" in text
    assert (
        "optimizer.safetensors is missing" in text and "'notes.txt' does not belong to a checkpoint" in text
    )


def test_a_checkpoint_without_digests_is_refused(run: Path) -> None:
    (newest(run) / DIGESTS).unlink()
    assert "digests.json is missing" in refusal(newest(run))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"state.json": "x"}', "[" * 100_000, "\udcff"])
def test_damaged_digests_are_named(text: str, run: Path) -> None:
    (newest(run) / DIGESTS).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "digests.json is damaged" in refusal(newest(run))


def test_a_foreign_file_is_named_and_hidden_ones_are_ignored(run: Path) -> None:
    (newest(run) / ".DS_Store").write_bytes(b"")
    verified(newest(run))
    (newest(run) / "notes.txt").write_text("mine")
    text = refusal(newest(run))
    assert "'notes.txt' does not belong to a checkpoint" in text and "Move it out" in text
    assert "step-" not in text.split("\n")[1], "no checkpoint is to be removed for it"


def test_a_file_that_the_disk_cannot_read_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ill(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint_digests.hashlib, "file_digest", ill)
    assert f"weights.safetensors cannot be read: {os.strerror(errno.EIO)}" in refusal(newest(run))


def test_a_checkpoint_that_has_just_been_removed_is_not_called_damaged(run: Path) -> None:
    """A run that is training saves another one and removes it: the reader may try again."""
    checkpoint = newest(run)
    shutil.rmtree(checkpoint)
    with pytest.raises(FileNotFoundError, match=checkpoint.name):
        verified(checkpoint)


def test_only_the_files_that_are_used_are_read(run: Path) -> None:
    """The optimizer's state is larger than the weights, and evaluation and export do not need it."""
    flip_a_bit(newest(run) / "optimizer.safetensors")
    assert result_checkpoint(run) == newest(run)
    (newest(run) / "optimizer.safetensors").unlink()
    with pytest.raises(RunError, match=r"optimizer\.safetensors is missing"):
        result_checkpoint(run)


# Remedies


def test_undamaged_checkpoints_are_named_and_used_once_the_damaged_are_removed(run: Path) -> None:
    whole, damaged = with_another(run, 1), with_another(run, 2)
    for checkpoint in (damaged, newest(run)):
        flip_a_bit(checkpoint / WEIGHTS)
    text = refusal(newest(run))
    assert f"Undamaged: {whole.name}. Remove {newest(run)} and {damaged}; then {whole.name} is used" in text
    assert f"`talik resume {run}` continues from it" in text
    for checkpoint in (damaged, newest(run)):
        shutil.rmtree(checkpoint)
    set_state(whole, best_step=None)
    assert result_checkpoint(run) == whole


def test_a_run_without_an_undamaged_checkpoint_can_begin_again(run: Path) -> None:
    before = (newest(run) / WEIGHTS).read_bytes()
    name = newest(run).name
    flip_a_bit(newest(run) / WEIGHTS)
    text = refusal(newest(run))
    assert f"remove {newest(run)}, and `talik resume {run}` begins at the first step" in text
    shutil.rmtree(newest(run))
    talik.resume(run)
    assert newest(run).name == name and (newest(run) / WEIGHTS).read_bytes() == before


def test_the_best_checkpoint_is_used_or_reported_as_removed(run: Path) -> None:
    best = with_another(run, 1)
    set_state(newest(run), best_step=1)
    said: list[Any] = []
    assert result_checkpoint(run, said.append) == best and not said
    flip_a_bit(best / WEIGHTS)
    with pytest.raises(RunError, match=rf"Undamaged: {newest(run).name}\. Remove .*{best.name}; then"):
        result_checkpoint(run)
    shutil.rmtree(best)
    assert result_checkpoint(run, said.append) == newest(run)
    assert said == [
        Status("note", f"the best checkpoint, {best.name}, was removed: {newest(run).name} is used")
    ]


def test_a_damaged_state_names_no_best_checkpoint(run: Path) -> None:
    with_another(run, 1)
    state = read_json(newest(run) / STATE)
    (newest(run) / STATE).write_text(json.dumps({**state, "best_step": 1}))
    with pytest.raises(RunError, match=r"state\.json is damaged"):
        result_checkpoint(run)


# Users of a checkpoint


class Reached(Exception):
    """Raised in place of loading the model."""


USES: dict[str, Callable[[Path, Path, Path], object]] = {
    "export": lambda run, rows, out: talik.export(run, out),
    "eval": lambda run, rows, out: talik.evaluate(run, rows),
    "chat": lambda run, rows, out: load_for_chat(run),
    "resume": lambda run, rows, out: talik.resume(run),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_uses_a_damaged_checkpoint(use: str, run: Path, rows: Path, tmp_path: Path) -> None:
    flip_a_bit(newest(run) / WEIGHTS)
    with pytest.raises(RunError, match=r"weights\.safetensors is damaged"):
        USES[use](run, rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", USES)
def test_a_checkpoint_is_verified_once_and_before_anything_that_takes_long(
    use: str, run: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    honest = hashlib.file_digest

    def counted(file: io.FileIO, kind: str) -> Any:
        read.append(Path(str(file.name)).name)
        return honest(file, kind)

    def slow(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(checkpoint_digests.hashlib, "file_digest", counted)
    for module, name in (
        ("run", "open_run_model"),
        ("evaluation", "open_run_model"),
        ("chat", "load_whole_model"),
    ):
        monkeypatch.setattr(import_module(f"talik.{module}"), name, slow)
    if use == "export":
        USES[use](run, rows, tmp_path / "out")
    else:
        with pytest.raises(Reached):
            USES[use](run, rows, tmp_path / "out")
    assert read.count(WEIGHTS) == 1
    assert read.count("optimizer.safetensors") == (1 if use == "resume" else 0)
