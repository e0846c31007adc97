"""What the documentation shows is run: the Python page's code, and the README's `talik` lines."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from talik.cli.main import main

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "README.zh-CN.md"]


def test_the_python_page(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"folder": str(model_folder), "rows": str(rows), "runs": tmp_path}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["result"].tuned.loss < names["result"].base.loss and names["loss"].item() < 6


def talik_lines(readme: str) -> list[str]:
    """The `talik ...` lines of the README's shell blocks, without comments."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("talik ")]


@pytest.mark.parametrize("readme", READMES)
def test_the_readmes_lines_run_on_a_small_model(
    readme: str, model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5-7B stands for the small model here, and the demo has a test of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("questions.jsonl", "other.jsonl"):
        Path(name).write_bytes(rows.read_bytes())
    lines = talik_lines(readme)
    assert {line.split()[1] for line in lines} >= {
        "inspect",
        "preview",
        "train",
        "resume",
        "eval",
        "chat",
        "export",
        "plan",
        "explain",
        "machine",
    }
    for line in lines:
        words = shlex.split(line)[1:]
        words = [str(model_folder) if "Qwen2.5" in word else word for word in words]
        if words[0] == "plan" or "--habit" in words:
            words += ["--top-layers", "2"]
        if words[0] == "train":
            words += ["--precision", "fp32", "--batch-tokens", "300", "--top-layers", "2"]
        assert main(words) == 0, line


def test_both_readmes_show_the_same_commands() -> None:
    blocks = [
        re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
        for name in READMES
    ]
    commands = [
        [line.split("  #")[0].strip() for block in some for line in block.splitlines()] for some in blocks
    ]
    assert commands[0] == commands[1] and "python3 dev.py demo" in commands[0]
