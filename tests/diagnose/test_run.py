"""Explanations of a run's memory: the verdict about the whole run first, then the phases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from talik.base.errors import RunError
from talik.cli.main import main
from talik.diagnose.run import explain_run
from talik.training.run.folder import is_run

MIB = 1 << 20


def ended(folder: Path, **phases: tuple[int, int]) -> Path:
    """The files of an ended run with (promised, measured) MiB by phase; 0 for none."""
    return written(folder, "results.json", {"memory": rows(phases)})


def rows(phases: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    named = {name: zip(("promised", "measured"), sizes, strict=True) for name, sizes in phases.items()}
    return {name: {use: size * MIB for use, size in sizes if size} for name, sizes in named.items()}


def written(folder: Path, name: str, fields: dict[str, Any]) -> Path:
    (folder / name).write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_a_run_within_its_promise_may_have_phases_above_theirs(tmp_path: Path) -> None:
    explained = explain_run(ended(tmp_path, load=(100, 300), backward=(1000, 1050)))
    assert (explained.kept, explained.promised, explained.measured) == (True, 1000 * MIB, 1050 * MIB)
    first, *_ = str(explained).splitlines()
    assert first.startswith("the run kept its promise: 1.0 GiB measured at the peak, 1000.0 MiB promised")
    (finding,) = explained.findings
    assert (finding.habit, finding.where, finding.number) == ("beyond-promise", "load", 200 * MIB)


def test_a_run_beyond_its_promise(tmp_path: Path) -> None:
    explained = explain_run(ended(tmp_path, load=(100, 110), backward=(1000, 1065)))
    assert explained.kept is False
    assert str(explained).startswith("the run broke its promise: 1.0 GiB measured")
    assert [finding.where for finding in explained.findings] == ["backward"]
    within = explain_run(ended(tmp_path, backward=(1000, 1064)))
    assert within.kept and not within.findings


def test_a_run_without_planned_peaks(tmp_path: Path) -> None:
    explained = explain_run(ended(tmp_path, backward=(0, 100)))
    assert explained.kept is None and "no planned peaks: 100.0 MiB measured" in str(explained)


@pytest.mark.parametrize(("measured", "kept"), [(1010, True), (1200, False)])
def test_a_run_that_ran_out_of_memory(tmp_path: Path, measured: int, kept: bool) -> None:
    memory = rows({"load": (100, 90), "backward": (1000, measured)})
    fields = {"problem": "out of memory", "phase": "load", "step": 0, "memory": memory}
    explained = explain_run(written(tmp_path, "broken.json", fields))
    (finding,) = explained.findings
    assert explained.kept is kept and (finding.habit, finding.where) == ("broken", "load")
    assert ("took more memory than promised" in finding.what) is not kept
    assert ("once 1.0 GiB are free" in finding.line) is kept


def test_a_run_that_has_not_ended(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has not ended"):
        explain_run(tmp_path)


def test_the_command_prints_the_verdict_first_and_then_the_phases(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_run(run_folder)
    assert main(["explain", str(run_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("the run ") and "promise: " in lines[0]
    assert any(line.startswith("backward") for line in lines[1:])
    assert main(["explain", str(run_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["measured_bytes"] == max(row["measured"] for row in report["memory"].values())
