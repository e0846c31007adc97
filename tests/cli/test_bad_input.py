"""What users get wrong: one clear message with the place and the remedy, exit 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import safe_open

from talik.cli.main import main

GOOD = '{"input": "What is 1 plus 1?", "output": "2"}\n'
SMALL = ["--top-layers", "2", "--precision", "fp32", "--epochs", "1", "--batch-tokens", "300"]
Refused = Callable[..., str]


def held(*folders: Path) -> set[Path]:
    """Everything in the folders but locks, and what is remembered of the machine and of weights."""
    paths = {path for folder in folders for path in folder.rglob("*") if path.suffix != ".lock"}
    return {p for p in paths if p.name not in ("home", "machine.json") and "digests" not in p.parts}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the command runs; Talik's home is in it, and no hub is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TALIK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused, and returns its one message; by default nothing may be written."""

    def run(*argv: object, leaves: bool = False) -> str:
        capsys.readouterr()
        before = held(here)
        code = main([str(part) for part in argv])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "") and "Traceback" not in err, err
        assert leaves or held(here) == before, "something was written"
        assert not [path for path in held(here) if path.name.startswith(".")], "something half-written stays"
        messages = re.findall(r"^error .*|^.*For full helptext.*", err, re.MULTILINE)  # ours, or tyro's
        assert len(messages) == 1, err
        return err[err.index(messages[0]) :] if messages[0].startswith("error") else err

    return run


def assert_says(message: str, *words: str) -> None:
    assert all(word in message for word in words), message


# Rows

CSV = "frage,antwort\na,b\n"
BY_NAME = ["--input-field", "frage", "--output-field", "reply"]
ROWS: dict[str, tuple[str | bytes | None, list[str], list[str]]] = {
    "missing.jsonl": (None, [], ["missing.jsonl: there is no such file"]),
    "empty.jsonl": ("", [], ["empty.jsonl: the file is empty"]),
    "blank.jsonl": (" \n\n", [], ["blank.jsonl: the file is empty"]),
    "broken.jsonl": (
        GOOD * 316 + '{"input": "a", "output": }\n' + GOOD * 9,
        [],
        ["broken.jsonl:317: broken JSON at column 26", "one complete object on each line"],
    ),
    "broken.json": ('[{"input": "a",\n"output": "b"},\n}]', [], ["broken.json:3: broken JSON at column 1"]),
    "columns.csv": (CSV, BY_NAME, ["columns.csv:2: field 'reply' is missing", "'frage', 'antwort'"]),
    "unknown.csv": (CSV, [], ["unknown.csv:2: no data format", "--input-field"]),
    "half.csv": (CSV, BY_NAME[:2], ["input_field and output_field go together"]),
    "number.jsonl": (
        GOOD * 4 + '{"input": "a", "output": 5}\n' + '{"input": "a", "output": null}\n',
        [],
        ["number.jsonl:5: field 'output'", "a number (5)", "number.jsonl:6", "null", "2 rows in all"],
    ),
    "mixed.jsonl": (
        GOOD * 4 + '{"prompt": "a", "completion": "b"}\n',
        [],
        ["mixed.jsonl:5", "'prompt-completion', and its file 'input-output'", "file of its own"],
    ),
    "gbk.jsonl": (
        GOOD.encode() + '{"input": "你好", "output": "世界"}'.encode("gb18030"),
        [],
        ["gbk.jsonl:2: the file is not UTF-8", "GB18030", "Save the file again as UTF-8"],
    ),
    "utf16.jsonl": (GOOD.encode("utf-16"), [], ["utf16.jsonl:1", "UTF-16", "Save the file again"]),
    "long.jsonl": (GOOD, ["--max-length", "3"], ["long.jsonl:1", "3 tokens", "Raise max_length"]),
    "few.jsonl": (GOOD, ["--held-out", "0.5"], ["few.jsonl: held_out 0.5 leaves", "--eval-data"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, model_folder: Path, refused: Refused, here: Path) -> None:
    content, options, words = ROWS[name]
    if content is not None:
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_says(refused("train", model_folder, name, "-o", "run", *SMALL, *options), *words)
    assert not Path("run").exists()


@pytest.mark.parametrize("command", ["eval", "preview"])
def test_rows_of_other_commands(command: str, model_folder: Path, refused: Refused) -> None:
    model = ["preview", "no.csv", "--model", model_folder]
    argv = model if command == "preview" else ["eval", model_folder, "no.csv"]
    assert_says(refused(*argv), "no.csv: there is no such file")


def test_rows_to_evaluate_on(model_folder: Path, rows: Path, refused: Refused) -> None:
    message = refused("train", model_folder, rows, "-o", "run", *SMALL, "--eval-data", "no.csv")
    assert_says(message, "no.csv: there is no such file")


# Models


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "without weights": (no_weights, ["no model.safetensors", "A model's folder holds"]),
    "pickles": (pickles, ["no model.safetensors", "pickles, which can run code", "python -c"]),
    "without config": (no_config, ["no config.json", "A model's folder holds"]),
    "not there": (shutil.rmtree, ["no such folder"]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("command", ["train", "eval", "chat"])
def test_models(
    command: str, name: str, model_folder: Path, rows: Path, refused: Refused, here: Path
) -> None:
    spoil, words = MODELS[name]
    model = here / "model"
    shutil.copytree(model_folder, model)
    spoil(model)
    rest = {"train": [rows, "-o", "run", *SMALL], "eval": [rows], "chat": ["--prompt", "Hello"]}
    assert_says(refused(command, model, *rest[command]), str(model), *words)


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_more_top_layers_than_the_model_has(
    command: str, model_folder: Path, rows: Path, refused: Refused
) -> None:
    rest = [rows, "-o", "run"] if command == "train" else []
    assert_says(refused(command, model_folder, *rest, "--top-layers", 9), " 9", "4 layers", " 1 ", " 4")


def test_a_device_that_is_not_there(model_folder: Path, rows: Path, refused: Refused) -> None:
    message = refused("train", model_folder, rows, "-o", "run", *SMALL, "--device", "abacus")
    assert_says(message, "no device 'abacus'", "There is: cpu")


# Commands, options and recipes


def test_an_unknown_command(refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "there is no command 'trian'" in err and "\n  train MODEL DATA" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "run", "--top-layer", "3"], ["Unrecognized options: --top-layer", "--top-layers INT"]),
        (["-o", "run", "--epochs", "two"], ["--epochs", "'two'"]),
        (["-o", "run", "--precision", "int4"], ["--precision", "'int4'", "'bf16-sr'"]),
        ([], ["Missing", "-o STR"]),
    ],
)
def test_options(
    options: list[str], words: list[str], model_folder: Path, rows: Path, refused: Refused
) -> None:
    assert_says(refused("train", model_folder, rows, *options), *words, "talik train --help")


def test_missing_names_are_named(refused: Refused) -> None:
    assert_says(refused("train", "-o", "run"), "MODEL", "DATA", "talik train --help")
    assert_says(refused("export", "run"), "OUT")


def test_every_wrong_field_at_once(model_folder: Path, rows: Path, refused: Refused, here: Path) -> None:
    (here / "r.yaml").write_text("epochs: 0\nmax_length: long\ntrain_on: me\ndatta: x\nlearning_rate: 3\n")
    options = ["-c", "r.yaml", "--held-out", "-2", "--learning-rate", "-1"]
    message = refused("train", model_folder, rows, "-o", "run", *options)
    assert_says(message, "r.yaml: 6 problems:", "epochs: 0:", "max_length: 'long':", "train_on: 'me':")
    assert_says(
        message,
        "datta: there is no such field",
        "held_out: -2.0:",
        "learning_rate: -1.0:",
        "--help",
    )


def test_what_is_wrong_in_different_places_is_said_at_once(
    model_folder: Path, refused: Refused, run: Path
) -> None:
    plan = ["--memory", "lots", "--ram", "1 sack", "--top-layers", "0", "--picture", "x.pdf"]
    message = refused("plan", model_folder, *plan, "--device", "cpu", "--machine", "RTX 4090")
    assert_says(
        message, "5 problems:", "top_layers: 0:", "--machine", "x.pdf", "--memory: 'lots' is not a size"
    )
    assert_says(message, "--ram: '1 sack' is not a size")
    options = ["--memory", "lots", "--epochs", "0"]
    assert_says(
        refused("train", model_folder, "a", "-o", "b", *options), "2 problems:", "epochs: 0:", "'lots'"
    )
    message = refused("train", model_folder, "a.jsonl", "-o", run, "--eval-data", "b.jsonl")
    assert_says(message, "3 problems:", "exists already", "a.jsonl: there is no", "b.jsonl: there is no")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-layers", "0"], ["top_layers: 0:", "greater than or equal to 1"]),
        (["--top-layers", "2", "--thaw", "norm"], ["top_layers and thaw are two ways"]),
        (["--thaw", "top.2,hed"], ["'hed' is not one of all, layers.20-27, layers.3, top.5, norm, head or"]),
        (["--thaw", "layers.3-1"], ["'layers.3-1' is not one of"]),
        (["--thaw", "layers.2-4"], ["layers.2-4 needs 5 layers", "4 layers", "0 to 3"]),
        (["--early-stop", "2", "--eval-every", "3"], ["early_stop needs", "eval_every needs"]),
        (["--held-out", "0.1", "--eval-data", "x"], ["eval_data and held_out are two ways"]),
    ],
)
def test_fields_that_contradict_each_other(
    options: list[str], words: list[str], model_folder: Path, rows: Path, refused: Refused
) -> None:
    assert_says(refused("train", model_folder, rows, "-o", "run", *options), *words)


RECIPES: dict[str, tuple[str | bytes | None, list[str]]] = {
    "missing": (None, ["r.yaml: there is no such recipe file"]),
    "unknown field": ("eopchs: 3\n", ["r.yaml: eopchs: there is no such field", "--help"]),
    "not YAML": ("epochs: 1\n? [a\n: b]\n", ["r.yaml:3: is not YAML", "one `field: value` a line"]),
    "not UTF-8": (b"model: \xff\n", ["r.yaml: is not YAML in UTF-8", "one `field: value` a line"]),
    "no fields": ("just text\n", ["r.yaml: holds no fields", "one `field: value` a line"]),
    "a number for a name": ("1: 2\n", ["r.yaml: 1: there is no such field"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, model_folder: Path, rows: Path, refused: Refused, here: Path) -> None:
    content, words = RECIPES[name]
    if content is not None:
        (here / "r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_says(refused("train", model_folder, rows, "-o", "run", "-c", "r.yaml"), *words)


@pytest.mark.parametrize(
    ("content", "word"), [("data: 7\n", "data: 7: input should be"), ("epochs: 1\n", "data: is missing")]
)
def test_a_recipe_without_data(
    content: str, word: str, model_folder: Path, refused: Refused, here: Path
) -> None:
    (here / "r.yaml").write_text(content)
    assert_says(refused("train", model_folder, "-o", "run", "-c", "r.yaml"), "r.yaml: ", word)


# Run folders and exports


@pytest.fixture
def run(run_folder: Path, model_folder: Path, here: Path) -> Path:
    """A copy of a finished run whose base model is a copy too."""
    shutil.copytree(run_folder, here / "run")
    shutil.copytree(model_folder, here / "model")
    source = here / "run" / "source.json"
    source.write_text(json.dumps({**json.loads(source.read_text()), "folder": str(here / "model")}))
    return Path("run")


def commands(run: Path | str, rows: Path) -> dict[str, list[Any]]:
    """Every command that uses a run."""
    return {
        "resume": [run],
        "export": [run, "out"],
        "eval": [run, rows],
        "chat": [run, "--prompt", "Hello", "--max-tokens", 2],
    }


USERS = ["resume", "export", "eval", "chat"]


def test_a_run_folder_that_is_taken(
    model_folder: Path, rows: Path, refused: Refused, here: Path, run: Path
) -> None:
    message = refused("train", model_folder, rows, "-o", run, *SMALL)
    assert_says(message, "run: the folder exists already", "talik resume run", "new or empty")
    (here / "file").touch()
    message = refused("train", model_folder, rows, "-o", "file", *SMALL)
    assert_says(message, "file: the folder exists already", "new or empty")
    assert "resume" not in message
    message = refused("train", model_folder, rows, "-o", "file/run", *SMALL)
    assert_says(message, "file/run: cannot be used: Not a directory", "Name another place")


@pytest.mark.parametrize("command", USERS)
@pytest.mark.parametrize("there", [True, False])
def test_not_a_run_folder(there: bool, command: str, rows: Path, refused: Refused, here: Path) -> None:
    if there:
        (here / "nothing").mkdir()
    message = refused(command, *commands("nothing", rows)[command])
    assert_says(message, "nothing")
    if command in ("resume", "export"):  # the others take a model as well
        assert_says(message, "is not a run folder" if there else "no such folder", "talik train -o")


@pytest.mark.parametrize("command", ["export", "eval", "chat"])
def test_a_run_without_a_checkpoint(command: str, rows: Path, refused: Refused, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    leaves = command == "eval"  # the cache
    message = refused(command, *commands(run, rows)[command], leaves=leaves)
    assert_says(message, "run: this run has no checkpoint yet", "talik resume run")


def other_shape(weights: Path) -> None:
    with safe_open(weights, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in set(file.keys())}
    safetensors.torch.save_file(tensors, weights)


def other_numbers(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


@pytest.mark.parametrize("command", USERS)
@pytest.mark.parametrize(
    "change",
    [
        other_shape,
        other_numbers,
    ],
)
def test_a_base_model_that_changed(
    change: Callable[[Path], None], command: str, rows: Path, refused: Refused, here: Path, run: Path
) -> None:
    change(here / "model" / "model.safetensors")
    message = refused(command, *commands(run, rows)[command])
    assert_says(
        message, str(here / "model"), "not those that this run began with", "Put the former weights back"
    )


@pytest.mark.parametrize("out", ["model", "model/sub", "run", "file"])
def test_a_destination_that_is_taken(out: str, refused: Refused, here: Path, run: Path) -> None:
    (here / "file").touch()
    word = "is in the folder of the source model" if out.startswith("model") else "exists already"
    assert_says(refused("export", run, out), f"{out}: {word}", "Name a folder that is new or empty")


# The disk


def no_room_in(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The disk of these folders here has 1 MiB free."""
    usage = shutil.disk_usage(".")

    def usage_of(path: Path) -> Any:
        parts = Path(path).absolute().relative_to(Path.cwd()).parts or ("run",)  # which is not there yet
        return usage._replace(free=1 << (20 if not names or set(names) & set(parts) else 40))

    monkeypatch.setattr(shutil, "disk_usage", usage_of)


@pytest.mark.parametrize(
    ("where", "what"), [("home", "the trunk's cache: 1"), ("run", "the run's checkpoints and working")]
)
def test_no_room_to_train(
    where: str,
    what: str,
    model_folder: Path,
    rows: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    here: Path,
) -> None:
    (here / "home").mkdir()
    with monkeypatch.context() as patch:
        no_room_in(patch, where)
        message = refused("train", model_folder, rows, "-o", "run", *SMALL, leaves=where == "home")
        assert_says(message, where, what, "the disk has 1.0 MiB free", "Make room")
    begun = Path("run").exists()  # what is in the cache already is known only once the model is there
    assert begun == (where == "home") and not list(here.rglob("shard-*"))
    assert not begun or main(["resume", "run"]) == 0, "with room it goes on"


def test_no_room_to_export(refused: Refused, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    no_room_in(monkeypatch)
    message = refused("export", run, "out")
    assert_says(message, "out: export: 194.1 KiB are needed", "the disk has 1.0 MiB free", "Make room")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


WRITES: dict[str, tuple[str, str, Callable[..., None]]] = {
    "recipe": ("run.folder", "write_recipe", full),
    "cache": ("trunk.cache", "write_json", full),
    "weights": ("run.checkpoints", "write_tensors", full),
    "digests": ("run.checkpoint_digests", "write_json", full),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_disk_that_fills_up_in_training(
    name: str, model_folder: Path, rows: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    module, function, fail = WRITES[name]
    command = ["train", str(model_folder), str(rows), "-o", "run", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(import_module(f"talik.training.{module}"), function, fail)
        assert_says(refused(*command, leaves=True), "the disk is full", "Make room", "talik resume")
    assert not held(here / "run" / "checkpoints") and Path("run").exists() == (name != "recipe")
    assert main(["resume", "run"] if Path("run").exists() else command) == 0, "with room it goes on"


@pytest.mark.parametrize("write", ["whole.tensor_bytes", "files.write_text"])
def test_a_disk_that_fills_up_in_an_export(
    write: str, refused: Refused, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    module, _, name = write.partition(".")
    monkeypatch.setattr(import_module(f"talik.exporting.{module}"), name, full)
    assert_says(refused("export", run, "out"), "the disk is full", "Make room")
    assert not Path("out").exists()
