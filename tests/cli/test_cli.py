"""The command line as a user sees it: what is printed where, what is written, and the exit codes."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.commands import Done, Talik
from talik import __version__
from talik.base.errors import DoesNotFitError, RecipeError, TalikError, UsageError
from talik.cli.main import COMMANDS, HELP
from talik.evaluation import evaluate
from talik.recipe.aliases import ALIASES
from talik.recipe.recipe import Recipe, checked_recipe
from talik.recipe.recipe_file import read_fields

SMALL = ["--top-layers", "2", "--precision", "fp32", "--epochs", "1", "--batch-tokens", "300"]
QUESTION = "What is 2 plus 3?"


# Help


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import talik", {"torch", "transformers", "pydantic", "tyro", "rich"}),
        ("from talik.cli.main import main; main(['--help'])", {"torch", "transformers", "tyro"}),
    ],
)
def test_starting_is_quick(code: str, heavy: set[str]) -> None:
    program = f"import sys; {code}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"imported without need: {done.stderr}"


def test_help_names_every_command(talik: Talik) -> None:
    done = talik("--help")
    assert done.code == 0 and all(f"\n  {command} " in done.out for command in COMMANDS)
    assert talik() == Done(2, done.out, ""), "no command is no success"
    assert talik("--version") == Done(0, f"talik {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, talik: Talik) -> None:
    done = talik(command, "--help")
    names = next(line for line in HELP.splitlines() if line.startswith(f"  {command} ")).split()[1:]
    capitals = [name for name in names if name.replace("|", "").isupper() and len(name) > 1]
    assert done.code == 0 and done.err == "" and f"usage: talik {command} " in done.out
    assert all(name in done.out for name in capitals if name != "RUN" or command != "train"), capitals


def test_help_of_train_names_every_field_with_its_default(talik: Talik) -> None:
    shown = " ".join(talik("train", "--help").out.replace("│", " ").split())
    for name, field in Recipe.model_fields.items():
        assert (name.upper() if field.is_required() else f"--{name.replace('_', '-')}") in shown
        assert (field.description or "no description")[:40] in shown
    assert "(default: 5e-05)" in shown


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (TalikError("it broke"), 1, "it broke"),
        (UsageError("no", where="x:3", remedy="Do this."), 2, "x:3: no\n  Do this."),
        (DoesNotFitError("too large"), 3, "too large"),
        (KeyboardInterrupt(), 1, "talik resume RUN"),
        (OSError(errno.ENOSPC, "full", "file"), 2, "file: the disk is full"),
        (PermissionError(errno.EACCES, "denied", "file"), 2, "file: cannot be used"),
    ],
)
def test_exit_codes(
    raised: BaseException, code: int, words: str, talik: Talik, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: list[str]) -> None:
        raise raised

    monkeypatch.setattr("talik.cli.resume.command", fail)
    done = talik("resume")
    assert (done.code, done.out) == (code, "") and done.err.startswith("error") and words in done.err


def test_an_error_of_talik_itself_is_not_hidden(talik: Talik, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("talik.cli.resume.command", lambda _: [][0])
    with pytest.raises(IndexError):
        talik("resume")


# Commands that read


def test_inspect(model_folder: Path, talik: Talik) -> None:
    done = talik("inspect", model_folder, "--top-layers", 2)
    assert done.code == 0 and "num_hidden_layers 4: layers 0 to 3" in done.out
    value = talik("inspect", model_folder, "--top-layers", 2, "--json").value
    assert value["top"]["layers"] == [2, 3] and f"{value['parameters']:,}" in done.out


def test_preview(model_folder: Path, rows: Path, talik: Talik, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = talik("preview", rows, "--model", model_folder, "-n", 1, "--html", page)
    assert (
        done.code == 0
        and "+ 0 plus 0 is 0.<|im_end|>" in done.out.replace("\u00b7", "")
        and "What is 0 plus 1?" not in done.out
    )
    assert "30 examples" in done.err and "&lt;|im_end|&gt;" in page.read_text(encoding="utf-8")


# From rows to an exported model


def test_train_says_what_it_does_and_writes_a_run(
    model_folder: Path, rows: Path, talik: Talik, tmp_path: Path
) -> None:
    done = talik("train", model_folder, rows, "-o", tmp_path / "run", *SMALL, "--held-out", 0.2)
    assert done.code == 0 and "\nbase " in done.out and "\ntuned " in done.out
    assert f"talik chat {tmp_path / 'run'}" in done.out
    for line in (
        "recipe ",
        "data ",
        "trained  layers 2 to 3",
        "chain ",
        "trunk ",
        "train    step 4/4",
        "saved ",
    ):
        assert f"\n{line}" in f"\n{done.err}", line
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.yaml", "plan.json", "source.json", "results.json", "checkpoints", "log.txt"} <= names


def test_options_stand_over_the_recipe_file(
    model_folder: Path, rows: Path, talik: Talik, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: of another run\nepochs: 3\ntop_layers: 3\nprecision: fp32\n")
    arguments = (model_folder, rows, "-c", recipe, "-o", tmp_path / "run", "--epochs", 2, "--steps", 1)
    done = talik("train", *arguments, "--json")
    assert done.code == 0 and (done.value["steps"], done.value["run"]) == (1, str(tmp_path / "run"))
    again = tmp_path / "run" / "recipe.yaml"
    written = again.read_text(encoding="utf-8")
    assert f"model: {model_folder}\ndata: {rows}\n" in written, "MODEL comes first, whatever the file names"
    assert "epochs: 2\n" in written and "top_layers: 3\n" in written
    assert talik("train", "-c", again, "-o", tmp_path / "again").code == 0
    weights = "checkpoints/step-00000001/weights.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


def test_eval_compares_base_and_tuned(model_folder: Path, rows: Path, run_folder: Path, talik: Talik) -> None:
    value = talik("eval", run_folder, rows, "--json").value
    assert (value["examples"], value["trained_tokens"]) == (30, 330)
    assert value["tuned"]["loss"] < value["base"]["loss"] - 0.5
    done = talik("eval", run_folder, rows)
    assert all(f"{value[which]['loss']:.4f}" in done.out for which in ("base", "tuned"))
    model = talik("eval", model_folder, rows, "--train-on", "all", "--json").value
    assert set(model) == {"examples", "trained_tokens", "model"} and model["trained_tokens"] > 330


@pytest.fixture
def exported(run_folder: Path, talik: Talik, tmp_path: Path) -> Path:
    done = talik("export", run_folder, tmp_path / "out")
    assert done.code == 0 and str(tmp_path / "out") in done.out and "every byte compared" in done.err
    return tmp_path / "out"


def test_an_export_is_the_tuned_model(
    exported: Path, run_folder: Path, model_folder: Path, rows: Path, talik: Talik
) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    model, info = loaded
    assert model.dtype == torch.float32 and not any(info.values())
    tuned = talik("eval", run_folder, rows, "--json").value["tuned"]["loss"]
    assert evaluate(exported, rows, precision="fp32")["model"]["loss"] == pytest.approx(tuned, abs=1e-6)
    assert evaluate(model_folder, rows, precision="fp32")["model"]["loss"] > tuned + 0.5


def test_eval_of_an_export_is_eval_of_the_run(
    exported: Path, run_folder: Path, rows: Path, talik: Talik
) -> None:
    tuned = talik("eval", run_folder, rows, "--json").value["tuned"]["loss"]
    assert talik("eval", exported, rows, "--json").value["model"]["loss"] == pytest.approx(tuned, abs=1e-6)


def test_chat_answers_a_prompt_or_what_comes_in(
    run_folder: Path, model_folder: Path, talik: Talik, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = talik("chat", run_folder, "--prompt", QUESTION, "--max-tokens", 8)
    assert done.code == 0 and done.out.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    assert talik("chat", run_folder, "--max-tokens", 8).out == done.out, "the answers alone go to stdout"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nAnd 2 plus 4?\n\nnot asked\n"))
    both = talik("chat", run_folder, "--max-tokens", 8).out
    assert both.startswith(done.out) and both.count("\n") > done.out.count("\n")
    base = talik("chat", run_folder, "--base", "--prompt", QUESTION, "--max-tokens", 8)
    assert (base.code, base.out != done.out) == (0, True)
    assert talik("chat", model_folder, "--prompt", QUESTION, "--max-tokens", 8).code == 0
    assert talik("chat", model_folder, "--base", "--prompt", QUESTION).code == 2
    assert talik("chat", run_folder, "--max-tokens", 0, "--prompt", QUESTION).code == 2


def test_resume_of_a_finished_run_changes_nothing(run_folder: Path, talik: Talik) -> None:
    def files() -> dict[str, bytes]:
        paths = (path for path in run_folder.rglob("*") if path.is_file())
        return {
            str(path): path.read_bytes() for path in paths if path.name not in ("log.txt", "results.json")
        }

    before, result = files(), json.loads((run_folder / "results.json").read_text())
    again = talik("resume", run_folder, "--json").value
    assert files() == before and len(before) > 6
    measured = [value.pop("memory") for value in (again, result)]
    assert measured[0].keys() == measured[1].keys() and measured[0]["loss"] == measured[1]["loss"]
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


# Adapters


def test_adapters_from_the_plan_to_the_export(
    model_folder: Path, rows: Path, tmp_path: Path, talik: Talik
) -> None:
    lora = ["--thaw", "all", "--lora", "rank=8", "--precision", "fp32"]
    planned = talik("plan", model_folder, rows, *lora, "--json")
    assert planned.code == 0 and planned.value["chosen"]["cut"] == 0
    run = tmp_path / "run"
    options = ["--steps", "8", "--batch-tokens", "300", "--learning-rate", "0.02", "--held-out", "0.2"]
    done = talik("train", model_folder, rows, "-o", run, *lora, *options)
    assert done.code == 0 and "layers 0 to 3: rank=8, adapters on self_attn.q_proj," in done.err
    report = talik("eval", run, rows, "--json").value
    assert report["tuned"]["loss"] < report["base"]["loss"]
    asked = ["--prompt", QUESTION, "--max-tokens", 8]
    assert talik("chat", run, *asked).out != talik("chat", run, *asked, "--base").out
    assert talik("export", run, tmp_path / "merged").code == 0
    assert evaluate(tmp_path / "merged", rows)["model"]["loss"] == pytest.approx(
        report["tuned"]["loss"], abs=1e-5
    )
    done = talik("export", run, tmp_path / "adapter", "--adapter")
    assert done.code == 0 and "a folder of PEFT" in done.out
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "README.md", *tokenizer}


# Names of Transformers


def test_names_of_transformers_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\ndata: d\nmax_grad_norm: 0.3\nlr_scheduler_type: linear\n", encoding="utf-8")
    recipe = checked_recipe(read_fields(file))
    assert (recipe.clip, recipe.schedule) == (0.3, "linear")
    assert all(field in Recipe.model_fields for field in ALIASES.values())


def test_fields_under_two_names_and_those_without_a_counterpart_are_explained(tmp_path: Path) -> None:
    given = {"clip": 1.0, "max_grad_norm": 0.3, "per_device_train_batch_size": 4, "warmup": 2}
    with pytest.raises(RecipeError) as caught:
        checked_recipe({"model": "m", "data": "d", **given})
    text = str(caught.value)
    assert "3 problems" in text and "max_grad_norm: the same field as clip" in text
    assert "per_device_train_batch_size: a step is counted in tokens here" in text and "warmup: 2" in text


def test_an_option_of_transformers_overrides_the_file(talik: Talik, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\ndata: d\nmax_grad_norm: 0.3\n", encoding="utf-8")
    done = talik("train", "-c", str(file), "--max-grad-norm", "-1", "-o", "run")
    assert done.code == 2 and "clip: -1.0: input should be greater than or equal to 0 or 'last'" in done.err
    done = talik("train", "-c", str(file), "--bf16", "-o", "run")
    assert done.code == 2 and "--bf16: name the precision" in done.err


def test_two_ways_to_say_what_is_trained_are_refused_for_the_default_number_too(talik: Talik) -> None:
    done = talik("train", "m", "d", "--top-layers", "5", "--thaw", "norm", "--lora", "rank=zero", "-o", "run")
    assert done.code == 2 and "--top-layers and --thaw are two ways" in done.err and "'rank=zero'" in done.err


def test_eval_says_a_missing_device_and_missing_data_at_once(
    talik: Talik, run_folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    (run / "plan.json").write_text(json.dumps({**plan, "device": "cuda:7"}), encoding="utf-8")
    done = talik("eval", run, tmp_path / "none.jsonl")
    assert done.code == 2 and "no device 'cuda:7'" in done.err and "none.jsonl" in done.err
