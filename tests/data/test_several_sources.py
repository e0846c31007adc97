"""Runs on several sources from the command line: recipes that name them, shares, and evaluation of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from talik.base.files import read_json
from talik.cli.main import main

SMALL = ["--top-layers", "2", "--precision", "fp32", "--epochs", "1", "--batch-tokens", "300"]

pytestmark = pytest.mark.whole_run


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three files of rows in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("one.jsonl", 12), ("two.jsonl", 6), ("three.jsonl", 4)):
        rows = [{"input": f"{name} {n}?", "output": f"It is {n}." * (1 + n % 2)} for n in range(count)]
        Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ["one.jsonl", "two.jsonl", "three.jsonl"]


def run(*argv: Any) -> int:
    return main([str(part) for part in argv])


def weighted(whole: dict[str, Any], parts: list[dict[str, Any]], name: str) -> bool:
    total = sum(part[name] * part["trained_tokens"] for part in parts)
    return whole[name] == pytest.approx(total / whole["trained_tokens"])


def test_each_source_is_evaluated_by_itself(
    files: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", model_folder, files[0], "-o", "run", *SMALL, "--eval-data", *files[1:], "--json"]
    assert run(*argv) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result == read_json(Path("run/results.json"))
    assert list(result["by_source"]) == files[1:]
    for when in ("base", "tuned"):
        parts = [marks[when] for marks in result["by_source"].values()]
        assert sum(part["trained_tokens"] for part in parts) == result[when]["trained_tokens"]
        assert weighted(result[when], parts, "loss") and weighted(result[when], parts, "accuracy")
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [list(r["by_source"]) for r in records if "eval_loss" in r] == [files[1:], files[1:]]
    assert f"  {files[1]}: loss" in err

    assert run("eval", "run", *files[1:], "--json") == 0
    report = json.loads(capsys.readouterr().out)
    for source, marks in report["by_source"].items():
        for when, mark in marks.items():
            assert mark["loss"] == pytest.approx(result["by_source"][source][when]["loss"], rel=1e-5)
    assert run("eval", model_folder, *files[1:]) == 0
    assert f"model, {files[2]}" in capsys.readouterr().out

    assert run("export", "run", "model") == 0
    card = Path("model/README.md").read_text(encoding="utf-8")
    assert "| base, two.jsonl |" in card and "| tuned, three.jsonl |" in card


def test_one_source_is_told_as_ever(
    files: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", model_folder, files[0], "-o", "run", *SMALL, "--held-out", "3", "--json"]
    assert run(*argv) == 0
    assert "by_source" not in capsys.readouterr().out
    written = ("results.json", "metrics.jsonl")
    assert not any("by_source" in Path("run", name).read_text(encoding="utf-8") for name in written)
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["data"] == str(Path(files[0]).absolute())


def test_a_recipe_names_sources_with_their_shares(
    files: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sources = [files[0], {"path": files[1], "weight": 2.0, "limit": 3}]
    Path("r.yaml").write_text(yaml.safe_dump({"model": str(model_folder), "data": sources, "epochs": 1}))
    assert run("train", "-c", "r.yaml", "-o", "run", *SMALL) == 0
    err = capsys.readouterr().err
    assert "one.jsonl: 12 examples" in err and "two.jsonl: 6 examples" in err
    written = yaml.safe_load(Path("run/recipe.yaml").read_text(encoding="utf-8"))["data"]
    assert written == [
        str(tmp_path / files[0]),
        {"path": str(tmp_path / files[1]), "weight": 2.0, "limit": 3},
    ]
    shutil.rmtree("run/checkpoints")  # as if it had been killed at once
    Path("elsewhere").mkdir()
    assert run("resume", "run") == 0
    assert run("train", "-c", "r.yaml", model_folder, files[2], "-o", "other", *SMALL) == 0
    assert read_json(Path("other/results.json"))["steps"] == 1  # DATA stands in for the recipe's


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("data: [{path: one.jsonl, wieght: 2}]", "data.0.wieght: there is no such field"),
        ("data: [{path: one.jsonl, weight: 0}]", "data.0.weight: 0"),
        ("data: one.jsonl\nheld_out: 1.5", "whole number"),
        ("data: one.jsonl\nepochs: 1\nepochs: 2", "r.yaml:4: is not YAML: the key 'epochs' is given twice"),
    ],
)
def test_wrong_sources_are_named(
    fields: str, words: str, files: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r.yaml").write_text(f"model: {model_folder}\n{fields}\n")
    assert run("train", "-c", "r.yaml", "-o", "run") == 2
    assert words in capsys.readouterr().err and not Path("run").exists()


def test_a_key_that_a_plan_gives_twice_is_named(
    files: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plan.json").write_text('{"device": "cpu",\n"device": "cuda"}')
    assert run("train", model_folder, files[0], "-o", "run", "--plan", "plan.json") == 2
    assert "plan.json: is not JSON: the key 'device' is given twice" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_not_taken_for_one_with_other_rows(
    files: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", model_folder, files[0], "-o", "run", *SMALL) == 0
    source = Path("run/source.json")
    known = read_json(source)
    source.write_text(json.dumps({**known, "examples": "0"}))
    assert run("resume", "run") == 2
    assert "are not those that this run began with" in capsys.readouterr().err
    source.write_text(json.dumps({k: v for k, v in known.items() if k != "examples"} | {"data": "0"}))
    assert run("resume", "run") == 2
    assert "began with an earlier version of Talik" in capsys.readouterr().err
