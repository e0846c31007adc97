"""The index of a model in several files: names inside the folder, and tensors in the files that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from talik.base.errors import SourceError
from talik.model.weights.safetensors_file import read_tables, weight_files

NAMES = ("one.safetensors", "two.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights in two files, and a file outside that no index may name."""
    folder = tmp_path / "model"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        save_file({f"tensor {number}": torch.full((2,), float(number))}, folder / name)
    save_file({"tensor 0": torch.zeros(2)}, tmp_path / "outside.safetensors")
    write_index(folder, {"tensor 0": NAMES[0], "tensor 1": NAMES[1]})
    return folder


def write_index(folder: Path, places: Any) -> None:
    text = places if isinstance(places, str) else json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read_tables(folder)
    text = str(caught.value)
    assert "model.safetensors.index.json" in text and len(text) < 1500
    return text


def test_the_files_of_the_index_are_read(folder: Path) -> None:
    tables = read_tables(folder)
    assert [file.name for file in tables] == list(NAMES)
    assert tables[folder / NAMES[1]]["tensor 1"].read().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/../../b",
        "C:\\\\a",
        "..\\\\a",
        "a\0b",
        "sub/one",
    ],
)
def test_a_name_that_leaves_the_folder_is_refused(name: str, folder: Path) -> None:
    write_index(folder, {"tensor 0": name, "tensor 1": NAMES[1]})
    assert "'tensor 0'" in refusal(folder)
    with pytest.raises(SourceError, match="not the name of a file in its folder"):
        weight_files(folder)


@pytest.mark.parametrize("name", [None, 5, True, ["one.safetensors"], {}])
def test_a_name_that_is_no_text_is_refused(name: Any, folder: Path) -> None:
    write_index(folder, {"tensor 0": name})
    assert "not the name of a file in its folder" in refusal(folder)


DAMAGED = ["", "null", "5", "[]", "{}", "{", "NaN", "[" * 100_000, '{"weight_map": ' + "1" * 5000 + "}"]
DAMAGED += ['{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {}}']


@pytest.mark.parametrize("text", DAMAGED, ids=[text[:20] for text in DAMAGED])
def test_a_damaged_index_is_one_refusal(text: str, folder: Path) -> None:
    write_index(folder, text)
    refusal(folder)


def test_a_tensor_is_in_the_file_that_the_index_names(folder: Path) -> None:
    write_index(folder, {"tensor 0": NAMES[1], "tensor 1": NAMES[1], "tensor 2": NAMES[0]})
    text = refusal(folder)
    assert "'tensor 0' is not in two.safetensors" in text and "2 such tensors" in text


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    save_file({"tensor 0": torch.ones(2), "tensor 1": torch.ones(2)}, folder / NAMES[1])
    text = refusal(folder)
    assert "'tensor 0' is in one.safetensors and in two.safetensors" in text


def test_links_of_a_hub_s_cache_are_followed(folder: Path) -> None:
    blob = folder.parent / "blobs"
    (folder / NAMES[0]).rename(blob)
    try:
        (folder / NAMES[0]).symlink_to("../blobs")
    except OSError:
        pytest.skip("no links here")
    assert len(read_tables(folder)) == 2
