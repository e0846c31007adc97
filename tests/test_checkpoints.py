"""Checkpoints have digests: a damaged one is named, and nothing uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import talik
from talik.chat import load_for_chat
from talik.errors import RunError
from talik.train.resume import checkpoints, latest_checkpoint, verified
from talik.train.run_folder import result_checkpoint


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def flip_a_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-7] ^= 16
    file.write_bytes(raw)


def newest(run: Path) -> Path:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_is_found(name: str, run: Path) -> None:
    verified(newest(run))
    flip_a_bit(newest(run) / name)
    with pytest.raises(RunError, match=rf"{name} is damaged: its SHA-256 is") as caught:
        verified(newest(run))
    assert newest(run).name in str(caught.value)


def test_a_missing_file_is_named(run: Path) -> None:
    (newest(run) / "optimizer.safetensors").unlink()
    with pytest.raises(RunError, match=r"optimizer\.safetensors is missing"):
        verified(newest(run))


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000])
def test_damaged_digests_are_named(text: str, run: Path) -> None:
    (newest(run) / "digests.json").write_text(text)
    with pytest.raises(RunError, match=r"digests\.json"):
        verified(newest(run))


def test_the_checkpoints_that_are_whole_are_named(run: Path) -> None:
    other = newest(run).with_name("step-00000001")
    shutil.copytree(newest(run), other)
    flip_a_bit(newest(run) / "weights.safetensors")
    with pytest.raises(RunError, match=r"These are whole: step-00000001"):
        verified(newest(run))


def test_nothing_uses_a_damaged_checkpoint(run: Path, rows: Path, tmp_path: Path) -> None:
    flip_a_bit(result_checkpoint(run) / "weights.safetensors")
    for use in (
        lambda: talik.export(run, tmp_path / "out"),
        lambda: talik.evaluate(run, rows),
        lambda: load_for_chat(run),
        lambda: talik.resume(run),
    ):
        with pytest.raises(RunError, match="is damaged"):
            use()
    assert not (tmp_path / "out").exists()


def test_every_checkpoint_has_the_digests_of_its_files(run: Path) -> None:
    for checkpoint in checkpoints(run):
        known = json.loads((checkpoint / "digests.json").read_text())
        assert known.keys() == {path.name for path in checkpoint.iterdir()} - {"digests.json"}
