"""Complete runs: against a plain PyTorch loop and golden losses, stopped and resumed."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import talik
from helpers.training import plain_loss
from talik.base.errors import InterruptedRunError, NonFiniteError, RunError, TalikError
from talik.base.events import StepDone
from talik.base.files import read_json
from talik.data.batches import steps_of_epoch
from talik.data.dataset import read_sets
from talik.model.folder import ModelFolder
from talik.model.tokenizer import load_tokenizer
from talik.model.weights.working_copy import WorkingCopy
from talik.plan.ways import choose
from talik.recipe.recipe import Recipe
from talik.run import Result
from talik.training import loading
from talik.training.run.checkpoints import checkpoint_bytes, checkpoints, latest_checkpoint
from talik.training.run.schedule import learning_rate_at
from talik.training.step.top import Top, make_top
from talik.training.trunk import trunk

pytestmark = pytest.mark.whole_run
GOLDEN = Path(__file__).parents[2] / "golden" / "losses" / "qwen2-fp32.txt"


def recipe_for(model_folder: Path, rows: Path, **changes: Any) -> Recipe:
    fields = {"model": str(model_folder), "data": str(rows), "precision": "fp32", "batch_tokens": 200}
    return Recipe.model_validate({**fields, "thaw": "top.2,norm", "learning_rate": 3e-3, **changes})


STREAMED = {"top": "streamed", "recompute": True, "state": "disk", "inputs": "disk"}


def train(recipe: Recipe, run: Path, way: dict[str, Any] | None = None, **options: Any) -> Result:
    """Trains by a plan without simulation, which would take longer than these runs."""
    plan = choose(recipe, ModelFolder(Path(recipe.model))).model_copy(update=way or {})
    return talik.train(recipe, run, plan=plan, **options)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def plain_losses(recipe: Recipe, steps: int) -> list[float]:
    """A plain training loop: the whole model, frozen below, with PyTorch's AdamW and clipping."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    trained = [*model.model.layers[2:].parameters(), *model.model.norm.parameters()]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad = True
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon)
    examples = read_sets(recipe, load_tokenizer(Path(recipe.model)))[0].examples
    lengths, losses, epoch = [e.length for e in examples], [], 0
    while len(losses) < steps:
        for indices in steps_of_epoch(lengths, recipe.batch_tokens, recipe.seed, epoch)[
            : steps - len(losses)
        ]:
            batch = [examples[i] for i in indices]
            loss = plain_loss(model, batch, sum(e.trained_tokens for e in batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, recipe.max_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(recipe, len(losses) + 1, steps)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        epoch += 1
    return losses


@pytest.mark.parametrize("way", [{}, STREAMED], ids=["resident", "streamed"])
def test_twenty_steps_equal_a_plain_loop(
    model_folder: Path, rows: Path, tmp_path: Path, way: dict[str, Any]
) -> None:
    recipe = recipe_for(model_folder, rows, steps=20)
    train(recipe, tmp_path / "run", way)
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert len(losses) == 20 and losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(plain_losses(recipe, 20), abs=1e-5)


def test_a_disk_that_fills_up_within_a_streamed_step(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops with a complete last checkpoint, and continues exactly once there is room."""
    recipe = recipe_for(model_folder, rows, steps=6, save_every=2)
    whole = train(recipe, tmp_path / "whole", STREAMED)
    write = WorkingCopy.write
    left = [whole.steps // 2 * 24]  # about the tensors of two layers and the norm, in three steps

    def full(copy: WorkingCopy, name: str, tensor: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(copy, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(WorkingCopy, "write", full)
        with pytest.raises((OSError, TalikError), match=r"No space|full"):
            train(recipe, tmp_path / "run", STREAMED)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002"]
    talik.resume(tmp_path / "run")
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0][-4:] == losses[1][-4:]


def test_layers_between_frozen_ones(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    """The gradient passes through a frozen layer above a trained one; the checkpoint has the named layers."""
    recipe = recipe_for(model_folder, rows, steps=2, top_layers=5, thaw="layers.1,layers.3")
    train(recipe, tmp_path / "run")
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    names = load_file(checkpoint / "weights.safetensors").keys()
    assert {name.split(".")[2] for name in names} == {"1", "3"}
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "layer 1, layer 3: " in log and "layer 0 and layer 2 and the embeddings are frozen" in log


def test_golden_losses(
    model_folder: Path, rows: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The losses do not change with the code; other kernels may differ in the last digits."""
    train(recipe_for(model_folder, rows, steps=10, top_layers=5, thaw="top.2,norm,head"), tmp_path / "run")
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text("".join(f"{loss!r}\n" for loss in losses), encoding="utf-8")
    golden = [float(line) for line in GOLDEN.read_text(encoding="utf-8").split()]
    assert losses == pytest.approx(golden, rel=1e-5)


def test_the_files_of_a_run(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    seen: list[Any] = []
    recipe = recipe_for(model_folder, rows, held_out=0.2, epochs=2)
    result = train(recipe, folder, notify=seen.append)
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml",
        "plan.json",
        "source.json",
        "metrics.jsonl",
        "results.json",
        "template.json",
        "log.txt",
        "checkpoints",
        "run.lock",
    }
    first = metrics(folder)[0]
    assert first.keys() == {
        "step",
        "epoch",
        "loss",
        "trained_tokens",
        "tokens",
        "learning_rate",
        "grad_norm",
        "seconds",
        "peak_memory_bytes",
    }
    assert first["peak_memory_bytes"] > 50e6 and first["tokens"] <= 200
    done = [event for event in seen if isinstance(event, StepDone)]
    assert [event.step for event in done] == list(range(1, result.steps + 1))
    assert result.base and result.tuned and result.tuned.loss < 0.9 * result.base.loss
    newest = latest_checkpoint(folder)
    assert newest is not None
    trained = load_file(newest / "weights.safetensors")
    assert all("layers.2." in name or "layers.3." in name or name == "model.norm.weight" for name in trained)
    # Two fp32 tensors for each parameter, and a master in precision bf16 only.
    assert len(load_file(newest / "optimizer.safetensors")) == 2 * len(trained)


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        *((precision, "adamw") for precision in ("fp32", "bf16", "bf16-sr")),
        ("bf16", "adamw-8bit"),
        ("fp32", "adafactor"),
        ("bf16-sr", "muon"),
        ("bf16", "sgd"),
    ],
)
def test_stopped_and_resumed_is_the_same_bit_for_bit(
    model_folder: Path, rows: Path, tmp_path: Path, precision: str, optimizer: str
) -> None:
    """Ctrl-C twice in the middle of the second epoch, with dropout."""
    head = ",head" if optimizer == "adamw-8bit" else ""  # the one matrix that is large enough for 8 bits
    changes = {"precision": precision, "optimizer": optimizer, "thaw": f"top.2,norm{head}"}
    recipe = recipe_for(model_folder, rows, epochs=3, held_out=0.2, **changes)
    train(recipe, tmp_path / "whole")

    def press(event: Any) -> None:
        if isinstance(event, StepDone) and event.step in (9, 13):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError, match="after step 9"):
        train(recipe, tmp_path / "parts", notify=press)
    torch.manual_seed(123)  # whatever else happened to the generator
    with pytest.raises(InterruptedRunError, match="after step 13"):
        talik.resume(tmp_path / "parts", notify=press)
    result = talik.resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert result.steps == len(metrics(tmp_path / "parts"))
    losses = [record["loss"] for record in metrics(tmp_path / "whole")]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert_what_checkpoints_take(recipe, tmp_path / "whole")


def assert_what_checkpoints_take(recipe: Recipe, run: Path) -> None:
    """`checkpoint_bytes` is the size of one checkpoint times the number to keep and two more."""
    newest = latest_checkpoint(run)
    assert newest is not None
    trained, state = (load_file(newest / f"{kind}.safetensors") for kind in ("weights", "optimizer"))
    size = sum(tensor.nbytes for tensor in (*trained.values(), *state.values()))
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in trained.items()}
    assert checkpoint_bytes(parameters, recipe) == size * (recipe.keep + 2)
    assert any(tensor.dtype == torch.uint8 for tensor in state.values()) == (recipe.optimizer == "adamw-8bit")


def assert_same_run(one: Path, other: Path) -> None:
    names = [path.name for path in checkpoints(one)]
    assert [path.name for path in checkpoints(other)] == names
    for kind in ("weights", "optimizer"):
        first, second = (
            load_file(run / "checkpoints" / names[-1] / f"{kind}.safetensors") for run in (one, other)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    timeless = [
        [
            {k: v for k, v in record.items() if k not in ("seconds", "peak_memory_bytes")}
            for record in metrics(run)
        ]
        for run in (one, other)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(("way", "clip"), [({}, 1.0), (STREAMED, 1.0), (STREAMED, "last")])
def test_killed_inside_a_step_and_resumed(
    model_folder: Path, rows: Path, tmp_path: Path, way: dict[str, Any], clip: Any
) -> None:
    """SIGKILL during the updates of a step: metrics after the checkpoint are removed on resume."""
    recipe = recipe_for(model_folder, rows, steps=9, save_every=4, clip=clip, precision="bf16-sr")
    plan = choose(recipe, ModelFolder(model_folder)).model_copy(update=way)
    talik.train(recipe, tmp_path / "whole", plan=plan)
    script = (
        "import os, signal, sys, torch, talik\n"
        "from talik.training.step import gradients\n"
        "torch.set_num_threads(1)\n"
        "update = gradients.update\n"
        "def until(name, *given, step, **options):\n"
        "    if step == 6 and 'layers.3.mlp' in name:\n"
        "        os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))\n"
        "    update(name, *given, step=step, **options)\n"
        "gradients.update = until\n"
        "recipe = talik.Recipe.model_validate_json(sys.argv[1])\n"
        "plan = talik.Plan.model_validate_json(sys.argv[2])\n"
        "talik.train(recipe, sys.argv[3], plan=plan)\n"
    )
    killed = tmp_path / "killed"
    given = [recipe.model_dump_json(), plan.model_dump_json(), str(killed)]
    done = subprocess.run([sys.executable, "-c", script, *given], check=False)
    assert done.returncode != 0 and len(metrics(killed)) == 5
    assert [path.name for path in checkpoints(killed)] == ["step-00000004"]
    talik.resume(killed)
    assert_same_run(tmp_path / "whole", killed)


def test_a_finished_run_resumed_does_nothing(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    train(recipe_for(model_folder, rows, steps=3), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    talik.resume(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_not_finite_stops_and_names_the_examples(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    recipe = recipe_for(model_folder, rows, learning_rate=0.9, clip=0, precision="bf16", epochs=30, warmup=0)

    def poison(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            for top in tops:
                for _, weights in top.parameters():
                    weights.data.fill_(math.inf)

    tops: list[Top] = []

    def spy_out(*args: Any) -> Top:
        tops.append(make_top(*args))
        return tops[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "make_top", spy_out)
        with pytest.raises(NonFiniteError, match=r"step 3: the loss is nan.*rows\.jsonl:\d+"):
            train(recipe, tmp_path / "run", notify=poison)
    assert len(metrics(tmp_path / "run")) == 2


def test_early_stop_and_the_best_checkpoint(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    """With a far too high learning rate the evaluation loss rises, and the best checkpoint stays."""
    recipe = recipe_for(
        model_folder, rows, learning_rate=0.3, held_out=0.3, eval_every=1, early_stop=3, epochs=20, warmup=0
    )
    result = train(recipe, tmp_path / "run")
    state = read_json(checkpoints(tmp_path / "run")[-1] / "state.json")
    assert state["worse"] == 3 and result.steps == state["best_step"] + 3
    assert result.best_step == state["best_step"]


def test_the_trunk_runs_once(model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """It runs once for all epochs, and not again for another learning rate."""
    passed: list[int] = []
    honest = trunk.trunk_pass

    def counted(*args: Any) -> None:
        passed.append(sum(each.group.tokens for each in args[2]))
        honest(*args)

    monkeypatch.setattr(trunk, "trunk_pass", counted)
    result = train(recipe_for(model_folder, rows, epochs=3), tmp_path / "one")
    tokens = sum(record["tokens"] for record in metrics(tmp_path / "one"))
    assert result.steps > 3 and sum(passed) * 3 == tokens
    train(recipe_for(model_folder, rows, epochs=1, learning_rate=1e-3), tmp_path / "two")
    assert sum(passed) * 3 == tokens


def test_other_data_is_refused(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    mine = tmp_path / "rows.jsonl"
    mine.write_bytes(rows.read_bytes())
    train(recipe_for(model_folder, mine, steps=2), tmp_path / "run")
    mine.write_text(mine.read_text(encoding="utf-8").replace("plus 1 is", "plus 1 makes"), encoding="utf-8")
    with pytest.raises(RunError, match="not those that this run began with"):
        talik.resume(tmp_path / "run")


def test_a_run_is_resumed_from_another_folder(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows.parent)
    recipe = recipe_for(Path(os.path.relpath(model_folder)), Path(rows.name), steps=2)
    train(recipe, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert talik.resume("run").steps == 2


def test_two_processes_do_not_work_on_one_run(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    def second(event: Any) -> None:
        if isinstance(event, StepDone):
            with pytest.raises(RunError, match="another process"):
                talik.resume(tmp_path / "run")

    train(recipe_for(model_folder, rows, steps=1), tmp_path / "run", notify=second)


def test_an_incomplete_checkpoint_of_a_killed_process_is_removed(
    model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    train(recipe_for(model_folder, rows, steps=2), tmp_path / "run")
    part = tmp_path / "run" / "checkpoints" / ".step-00000009.part"
    part.mkdir()
    (part / "weights.safetensors").write_bytes(b"half")
    talik.resume(tmp_path / "run")
    assert not part.exists()
