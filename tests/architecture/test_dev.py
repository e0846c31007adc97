"""The benchmarks of dev.py are found by their names; no environment is made and nothing is run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dev(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """dev.py as a module that notes what it would install and run."""
    spec = importlib.util.spec_from_file_location("dev_for_test", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done: list[tuple[str, ...]] = []
    monkeypatch.setattr(module, "install", lambda extra, _: done.append(("install", extra)))
    monkeypatch.setattr(module, "run", lambda *command: done.append(tuple(map(str, command[1:]))) or 0)
    monkeypatch.setattr(module, "done", done, raising=False)
    return module


@pytest.mark.parametrize("name", ["seven-billion", "seven_billion"])
def test_a_benchmark_may_be_named_with_dashes(
    dev: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dev.py", "bench", name, "--only", "top-5"])
    assert dev.main() == 0
    file = str(ROOT / "benchmarks" / "seven_billion.py")
    assert dev.done == [("install", "test"), (file, "--only", "top-5")]


def test_versus_needs_the_model_of_the_demo(dev: ModuleType) -> None:
    assert dev.bench(["versus"]) == 0
    assert dev.done[:2] == [("install", "test"), ("install", "demo")]


@pytest.mark.parametrize("arguments", [[], ["seven-million"], ["common"], ["../dev"]])
def test_an_unknown_benchmark_lists_those_there_are(
    dev: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dev.py", "bench", *arguments])
    assert dev.main() == 2
    assert dev.done == []
    said = capsys.readouterr().err
    assert "seven-billion" in said and "old-readers" in said and "common" not in said.split(":")[-1]
    assert all(repr(name) in said for name in arguments)


def test_every_file_that_is_no_helper_is_listed(dev: ModuleType) -> None:
    files = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    helpers = {"common", "made", "contestants"}
    assert {name.replace("-", "_") for name in dev.benchmarks()} == files - helpers
