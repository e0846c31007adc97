"""What stands in two files of the project is the same in both."""

from __future__ import annotations

from pathlib import Path

import yaml

import talik

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_names_this_version() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == talik.__version__


def test_hosted_ci_runs_the_commands_of_ci_run() -> None:
    local = [line for line in read(".ci/run").splitlines() if "dev.py" in line]
    steps = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]["steps"]
    hosted = [step["run"] for step in steps if "dev.py" in step.get("run", "")]
    assert hosted == [line.replace("python3 ", "python ") for line in local] and len(hosted) == 2
