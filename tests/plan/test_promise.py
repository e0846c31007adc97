"""Runs stay within their planned memory, or end with a diagnosis."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import talik
from talik.base.errors import ChainError, DoesNotFitError, UsageError
from talik.base.files import read_json
from talik.cli.main import main
from talik.diagnose.run import explain_run
from talik.model.folder import ModelFolder
from talik.plan.promise import Promise
from talik.plan.target import slack_of
from talik.plan.ways import choose
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe, checked_recipe
from talik.run import Result


@pytest.fixture(scope="module")
def recipe(model_folder: Path, rows: Path) -> Recipe:
    fields = {"model": str(model_folder), "data": str(rows), "precision": "fp32", "top_layers": 2}
    return Recipe.model_validate({**fields, "batch_tokens": 300, "steps": 3})


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory, machine_json: str) -> tuple[Result, Path]:
    """A planned run."""
    folder = tmp_path_factory.mktemp("promise") / "run"
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        (home / "machine.json").write_text(machine_json, encoding="utf-8")
        patch.setenv("TALIK_HOME", str(home))
        return talik.train(recipe, folder), folder


def test_allocated_memory_is_as_promised(run: tuple[Result, Path]) -> None:
    result, folder = run
    promised = read_json(folder / "plan.json")["promised"]
    for phase in ("forward", "loss", "backward", "update"):
        row = result.memory[phase]
        assert row["promised"] == promised[phase]
        assert row["allocated"] == pytest.approx(promised[phase], rel=1e-3)
        assert row["measured"] > 0
    assert read_json(folder / "results.json")["memory"] == result.memory


def test_a_plan_is_repeated_bit_for_bit_and_tracking_changes_nothing(
    run: tuple[Result, Path], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = run
    monkeypatch.setattr("talik.plan.promise.TRACKED", 0)
    again = ["train", recipe.model, recipe.data[0].path, "--precision", "fp32", "--top-layers", "2"]
    again += ["--batch-tokens", "300", "--steps", "3", "--plan", str(folder / "plan.json")]
    assert main([*again, "-o", str(tmp_path / "again")]) == 0
    one, other = (
        load_file(next((where / "checkpoints").glob("*3")) / "weights.safetensors")
        for where in (folder, tmp_path / "again")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_plan_of_another_cut_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    plan = choose(recipe, ModelFolder(Path(recipe.model)))
    with pytest.raises(UsageError, match="cut at 3, and this run has 4 layers cut at 2"):
        talik.train(recipe, tmp_path / "run", plan=plan.model_copy(update={"cut": 3}))
    with pytest.raises(UsageError, match="no planned peaks"):
        talik.train(recipe, tmp_path / "run", plan=plan, enforce=True)
    assert not (tmp_path / "run").exists()


def test_a_run_that_kept_its_promise_is_shown_by_phase(
    run: tuple[Result, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(run[1])]) == 0
    out = capsys.readouterr().out
    assert "kept its promise" in out and "backward" in out and out.count(" %") >= 4
    assert main(["explain", str(run[1]), "--habit", "offloaded"]) == 2


def test_a_refused_run_leaves_its_reason_and_a_free_folder(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.chdir(Path(recipe.data[0].path).parent)
    recipe = checked_recipe({**recipe.model_dump(), "data": Path(recipe.data[0].path).name})
    with pytest.raises(DoesNotFitError, match=r"fits 200\.0 MiB: .* missing"):
        talik.train(recipe, folder, memory=200 << 20)
    refused = read_json(folder / "refused.json")
    assert not refused["planned"]["fits"] and refused["recipe"]["top_layers"] == 2
    monkeypatch.chdir(tmp_path)
    assert main(["explain", str(folder)]) == 0
    assert "200.0 MiB" in capsys.readouterr().out
    monkeypatch.chdir(Path(refused["recipe"]["data"]).parent)
    assert talik.train(recipe, folder, plan=choose(recipe, ModelFolder(Path(recipe.model)))).steps == 3
    assert not (folder / "refused.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a limit to break")
def test_a_broken_promise_ends_with_the_diagnosis(
    recipe: Recipe,
    run: tuple[Result, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = Plan.model_validate(read_json(run[1] / "plan.json"))
    hungry: list[Any] = []
    phase = Promise.phase

    def eat(self: Promise, name: str, size: int = 0) -> None:
        phase(self, name, size)
        if name == "backward":
            hungry.append(torch.ones(1 << 28))

    monkeypatch.setattr(Promise, "phase", eat)
    folder = tmp_path / "run"
    with pytest.raises(DoesNotFitError, match=r"step 1, backward: allocating 1\.0 GiB failed"):
        talik.train(recipe, folder, plan=plan, enforce=True)
    monkeypatch.undo()
    hungry.clear()
    assert read_json(folder / "broken.json")["phase"] == "backward"
    assert main(["explain", str(folder)]) == 0
    assert "backward" in capsys.readouterr().out
    assert talik.resume(folder).steps == 3
    assert not (folder / "broken.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a limit to break")
def test_a_limit_below_what_the_program_takes_ends_with_the_diagnosis(
    recipe: Recipe, run: tuple[Result, Path], tmp_path: Path
) -> None:
    plan = Plan.model_validate(read_json(run[1] / "plan.json"))
    little = plan.model_copy(update={"promised": {"load": 32 << 20}})
    with pytest.raises(DoesNotFitError, match=r"out of memory in load: [\d,]+ bytes are held already"):
        talik.train(recipe, tmp_path / "run", plan=little, enforce=True)
    assert read_json(tmp_path / "run" / "broken.json")["memory"]["load"]["promised"] == 32 << 20


def test_out_of_memory_is_recognised_behind_another_error(run: tuple[Result, Path]) -> None:
    """CPython itself may lose a MemoryError, and a library may raise another error in its place."""
    promise = Promise(Plan.model_validate(read_json(run[1] / "plan.json")))
    for lost in (SystemError("error return without exception set"), ChainError("cannot be run")):
        try:
            try:
                raise MemoryError
            except MemoryError:
                raise lost  # noqa: B904 - without a cause, as in such a library
        except Exception as error:
            assert promise.broken_by(error, run[1]) is not None
    assert promise.broken_by(ChainError("cannot be run"), run[1]) is None


def test_free_memory_is_kept_while_the_next_phase_has_enough(
    run: tuple[Result, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, trims = [100 << 20], []
    monkeypatch.setattr("talik.plan.promise.anonymous_bytes", lambda: held[0])
    monkeypatch.setattr("talik.machine.peak_memory.anonymous_bytes", lambda: held[0])
    monkeypatch.setattr("talik.plan.promise.trim_heap", lambda: trims.append(held[0] >> 20))
    plan = Plan.model_validate(read_json(run[1] / "plan.json"))
    promise = Promise(plan.model_copy(update={"promised": {"forward": 200 << 20}}))
    for now, name, size in (
        (100, "forward", 100),  # the first of its kind: nothing is known
        (140, "loss", 100),  # and so is this; 40 MiB were for 100 tokens
        (140, "forward", 100),  # needs 40 more
        (140, "forward", 127),  # needs 51
        (150, "forward", 127),  # ... and has 50
        (150, "forward", 90),  # needs 40 again
        (150, "forward", 128),  # of another kind, as is what has no size
        (150, "forward", 0),
        (160, "forward", 0),
        (180, "forward", 0),  # grew by 20
        (181, "forward", 0),
    ):
        held[0] = now << 20
        promise.phase(name, size)
        trims.append(name)
    first = [100, "forward", 140, "loss", "forward", "forward", 150, "forward", "forward"]
    assert trims == [*first, 150, "forward", 150, "forward", "forward", "forward", 181, "forward"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a limit to enforce")
def test_a_run_ends_within_its_enforced_promise(recipe: Recipe, tmp_path: Path) -> None:
    """In a process of its own, whose memory is that of a run and not of the tests."""
    folder = tmp_path / "run"
    command = ["train", recipe.model, recipe.data[0].path, "-o", str(folder), "--enforce"]
    command += ["--precision", "fp32", "--top-layers", "2", "--batch-tokens", "300", "--steps", "3"]
    done = subprocess.run(
        [sys.executable, "-c", f"from talik.cli.main import main; raise SystemExit(main({command!r}))"],
        capture_output=True,
        text=True,
        env={**fresh_environment(), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = read_json(folder / "results.json")
    promised = max(read_json(folder / "plan.json")["promised"].values())
    measured = max(row["measured"] for row in results["memory"].values())
    assert results["steps"] == 3 and 0 < measured <= promised + slack_of(promised)
    explained = explain_run(folder)
    assert explained.kept and (explained.promised, explained.measured) == (promised, measured)


def fresh_environment() -> dict[str, str]:
    """The environment without the settings that `import talik` made in it."""
    return {name: value for name, value in os.environ.items() if name not in talik.SETTLED}


GROWS = """
import torch, talik
from talik.base.system import anonymous_bytes
torch.set_num_threads(1)
one = torch.ones(400, 400, dtype=torch.bfloat16)
for length in range(2, 40):
    one[:length] @ one
before = anonymous_bytes()
for length in range(40, 400):
    one[:length] @ one
print(anonymous_bytes() - before)
"""


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no products in bf16 by oneDNN here"
)
def test_memory_does_not_grow_with_the_number_of_lengths() -> None:
    """Without the settings of `import talik`, processors with bf16 instructions took 230 MiB more."""
    command = [sys.executable, "-c", GROWS]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=fresh_environment())
    assert int(shown.stdout) < 16 << 20
