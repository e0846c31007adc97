"""A model by any name becomes a local folder, or a refusal that names what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.hub_stand_in import COMMIT, HubStandIn
from helpers.tiny_gguf import CONFIG, tiny_llama, write_gguf
from talik.base.errors import SourceError
from talik.model.source.source import find_model

NAME = "Org/Tiny"
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "README.md": b"not asked for",
    "original/consolidated.00.pth": b"not asked for",
    "consolidated.safetensors": b"not asked for",
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config, a tokenizer and weights whose content nobody reads here."""
    path = tmp_path / "tiny-model"
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (path / name).write_bytes(FILES[name])
    return path


def refused(model: object, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        find_model(str(model), **options)
    return str(caught.value)


# Folders


def test_a_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_model(str(folder))
    assert (source.folder, source.origin, source.kind, source.revision) == (
        folder,
        str(folder),
        "folder",
        None,
    )
    monkeypatch.chdir(folder.parent)
    assert find_model(folder.name).folder == folder, "a folder here comes before a model of the hub"
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert find_model(f"~/{folder.name}").folder == folder


def test_config_alone_is_enough_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    assert find_model(str(folder), weights=False).folder == folder
    assert find_model(str(folder / "config.json"), weights=False).folder == folder
    assert "no model.safetensors" in refused(folder)


def test_a_path_that_is_not_there_names_its_neighbours(folder: Path) -> None:
    text = refused(folder.with_name("tiny-modle"))
    assert str(folder.with_name("tiny-modle")) in text and "there is: tiny-model" in text
    assert "Name its folder" in refused(folder / "tokenizer.json")
    assert "no model was named" in refused(" ")


@pytest.mark.skipif(sys.platform == "win32", reason="there it is an ordinary path")
def test_a_path_of_windows_is_named_as_wsl_does() -> None:
    assert "/mnt/d/models/Qwen2.5-7B-Instruct" in refused("D:\\models\\Qwen2.5-7B-Instruct")


def change_config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00002.bin")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


UNUSABLE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
    "half a config": (
        lambda folder: (folder / "config.json").write_text('{"mod'),
        ["config.json", "no model_type"],
    ),
    "no type": (lambda folder: (folder / "config.json").write_text("[]"), ["no model_type"]),
    "bad value": (change_config(hidden_size="many"), ["Transformers does not accept it", "hidden_size"]),
    "pickles": (only_pickles, ["no model.safetensors", "pickles", "python -c", "save_pretrained"]),
    "missing shard": (missing_shard, ["1 of 2 files", "b.safetensors"]),
    "broken index": (broken_index, ["model.safetensors.index.json", "no weight_map"]),
    "pointer": (
        lambda folder: (folder / "model.safetensors").write_bytes(LFS),
        ["model.safetensors", "lfs pull"],
    ),
    "quantised": (
        change_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["quantised (gptq)"],
    ),
    "encoder-decoder": (
        change_config(model_type="bart", is_encoder_decoder=True),
        ["'bart'", "encoder-decoder"],
    ),
    "t5": (change_config(model_type="t5"), ["'t5'", "not a causal language model"]),
    "masked": (change_config(model_type="bert", architectures=["BertForMaskedLM"]), ["BertForMaskedLM"]),
    "own code": (
        change_config(model_type="novel", auto_map={"AutoModelForCausalLM": "modeling.NovelLM"}),
        ["'novel'", "modeling.NovelLM", "runs none"],
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_folder_that_cannot_be_used_is_refused(name: str, folder: Path) -> None:
    spoil, words = UNUSABLE[name]
    find_model(str(folder))
    spoil(folder)
    text = refused(folder)
    assert str(folder) in text and all(word in text for word in words), text


# The Hugging Face Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A stand-in that huggingface_hub takes for the hub, with an empty cache."""
    import time

    from huggingface_hub import constants

    with HubStandIn(NAME, dict(FILES)) as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        template = "{endpoint}/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace("{endpoint}", stand_in.url)
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # only whole chunks are kept
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield stand_in


def downloaded(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_hub_model_is_downloaded_once(hub: HubStandIn) -> None:
    source = find_model(NAME)
    assert (source.origin, source.kind, source.revision) == (NAME, "hub", COMMIT)
    assert downloaded(source.folder) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (source.folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    hub.seen.clear()
    assert find_model(NAME) == source
    assert find_model(NAME, offline=True) == source
    assert [seen for seen in hub.seen if seen[0] == "GET"] == []


def test_without_weights_only_small_files_are_downloaded(hub: HubStandIn) -> None:
    assert downloaded(find_model(NAME, weights=False).folder) == {"config.json", "tokenizer.json"}


def test_a_broken_download_goes_on_where_it_stopped(hub: HubStandIn) -> None:
    hub.broken = [4096]
    folder = find_model(NAME).folder
    assert ("GET", "model.safetensors", "bytes=4096-") in hub.seen
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_download_that_fails_can_be_run_again(hub: HubStandIn) -> None:
    hub.broken = [0] * 6
    text = refused(NAME)
    assert "the download failed" in text and "peer closed connection" in text and "Run it again" in text
    hub.seen.clear()
    assert (find_model(NAME).folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert {file for method, file, _ in hub.seen if method == "GET"} == {"model.safetensors"}


def test_offline_says_what_to_download(hub: HubStandIn, tmp_path: Path) -> None:
    text = refused(NAME, offline=True, revision="v2")
    assert str(tmp_path / "cache") in text and f"hf download {NAME} --revision v2" in text
    find_model(NAME, weights=False)
    assert "not wholly" in refused(NAME, offline=True)
    assert find_model(NAME, weights=False, offline=True).revision == COMMIT


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((404, "RepoNotFound"), ["no such model", "hf auth login"]),
        ((401, "RepoNotFound"), ["no such model, or a private one"]),
        ((403, "GatedRepo"), ["accept terms", "hf auth login"]),
        ((404, "RevisionNotFound"), ["no revision 'v9'"]),
        ((418, "Teapot"), ["the download failed", "modelscope:Org/Tiny"]),
    ],
)
def test_what_the_hub_refuses(hub: HubStandIn, refusal: tuple[int, str], words: list[str]) -> None:
    hub.refusal = refusal
    text = refused(NAME, revision="v9")
    assert f"{hub.url}/{NAME}" in text and all(word in text for word in words), text


def test_pickles_and_gguf_on_the_hub_are_named_and_not_downloaded(hub: HubStandIn) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    assert "pickles" in refused(NAME) and "pytorch_model.bin" not in {file for _, file, _ in hub.seen}
    hub.files["tiny-Q8_0.gguf"] = hub.files.pop("pytorch_model.bin")
    assert f"hf download {NAME} tiny-Q8_0.gguf --local-dir ." in refused(NAME)


def test_hf_endpoint_is_respected(hub: HubStandIn, tmp_path: Path) -> None:
    code = (
        "from talik.model.source.source import find_model\n"
        f"print(find_model({NAME!r}, weights=False).revision)"
    )
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == COMMIT, done.stderr


# ModelScope


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A stand-in that modelscope takes for its hub, with an empty cache."""
    with HubStandIn(NAME, dict(FILES)) as stand_in:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", stand_in.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
        yield stand_in


def test_a_modelscope_model_is_downloaded(modelscope: HubStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"modelscope:{NAME}"
    assert f"modelscope download --model {NAME}" in refused(model, offline=True)
    text = refused("modelscope:Org/Nothing")
    assert "modelscope:Org/Nothing: the download failed" in text and "Check the name" in text
    source = find_model(model)
    assert (source.origin, source.kind) == (model, "modelscope")
    assert (source.folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    wanted = {file for method, file, _ in modelscope.seen if method == "GET"}
    assert wanted == {"config.json", "tokenizer.json", "model.safetensors"}
    assert find_model(model, offline=True).folder == source.folder
    assert capsys.readouterr().out == "", "results alone go to stdout"


@pytest.mark.parametrize("model, extra", [("modelscope:Org/Tiny", "modelscope"), ("tiny.gguf", "gguf")])
def test_a_missing_extra_is_named(
    model: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("TALIK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    assert f'pip install "talik[{extra}]"' in refused(model)


# GGUF


def test_a_gguf_file_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("TALIK_HOME", str(tmp_path / "home"))
    file, weights, said = tmp_path / "models" / "tiny.gguf", tiny_llama(), []
    file.parent.mkdir()
    write_gguf(file, weights)
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    source = find_model(str(file.parent), progress=said.append)
    assert source.kind == "gguf" and source.folder.parent == tmp_path / "home" / "models"
    assert len(said) == 1 and "tiny.gguf" in said[0]
    assert find_model(str(file), progress=said.append).folder == source.folder and len(said) == 1
    assert find_model(str(file), weights=False, progress=said.append).folder == source.folder
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before

    loaded: Any = AutoModelForCausalLM.from_pretrained(source.folder, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()) and not caplog.records, (info, caplog.records)
    assert model.dtype == torch.bfloat16 and not model.config.tie_word_embeddings
    config = json.loads((source.folder / "config.json").read_text())
    assert not {"_model_name_or_path", "quantization_config"} & set(config)
    state = model.state_dict()
    for name, weight in weights.items():
        loose = weight.abs().max().item() / 127 if "down_proj" in name else 0.0  # one step of Q8_0
        assert (state[name].float() - weight).abs().max().item() <= loose, name
    tokenizer: Any = AutoTokenizer.from_pretrained(source.folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 64)
    assert json.loads((source.folder / "talik_source.json").read_text())["file"] == str(file)
    if os.name == "posix":
        (plain := source.folder.with_name("plain")).touch()
        modes = {path.stat().st_mode for path in source.folder.iterdir()}
        assert modes == {plain.stat().st_mode}, "readable as the umask allows"


def test_a_gguf_file_without_weights_is_only_half_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALIK_HOME", str(tmp_path / "home"))
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    found = find_model(str(tmp_path / "tiny.gguf"), weights=False).folder
    assert (found / "config.json").exists() and (found / "tokenizer.json").exists()
    assert not list(found.glob("*.safetensors"))


def test_gguf_files_that_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALIK_HOME", str(tmp_path / "home"))
    weights = tiny_llama()
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_gguf(tmp_path / "a.gguf", weights)
    assert "model.layers.1.mlp.up_proj.weight" in refused(tmp_path / "a.gguf")
    assert not [path for path in (tmp_path / "home" / "models").iterdir() if path.is_dir()], (
        "nothing half-made stays"
    )
    (tmp_path / "b-00002-of-00003.gguf").write_bytes(b"GGUF")
    assert "llama-gguf-split --merge" in refused(tmp_path / "b-00002-of-00003.gguf")
    assert "holds 2 GGUF files: a.gguf, b-00002-of-00003.gguf" in refused(tmp_path)
    (tmp_path / "c.gguf").write_bytes(LFS)
    assert "cannot be read" in refused(tmp_path / "c.gguf")
