"""The scripts of examples/, each run as a user runs it: in a process of its own, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINING = ["usual_loop.py", "trainer_with_drop_in.py"]
TRAINED = re.compile(r"model\.layers\.[23]\.|model\.norm\.")  # top.2 of four layers, and norm


def run_example(name: str, *arguments: str | Path) -> str:
    """Runs a script to its end and returns what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_and_in_the_readme() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {*TRAINING, "explain_a_broken_loop.py"}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert scripts == set(re.findall(r"^python examples/(\w+\.py) ", readme, re.MULTILINE))


@pytest.mark.parametrize("name", TRAINING)
def test_the_loss_falls_and_only_the_top_changes(
    name: str, model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    output = run_example(name, model_folder, rows, tmp_path / "tuned", "--learning-rate", "0.01")
    losses = [float(found) for found in re.findall(r"\bloss'?:? '?(\d+\.\d+)", output)]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.3, output
    before = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32).state_dict()
    changed = {key for key, weight in before.items() if not torch.equal(weight, after[key])}
    assert before.keys() == after.keys()
    assert changed == {key for key in before if TRAINED.match(key)}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model_folder).chat_template


def test_every_mistake_of_the_broken_loop_is_found(model_folder: Path, rows: Path) -> None:
    output = run_example("explain_a_broken_loop.py", model_folder, rows)
    broken, mended = output.split("== the loop mended ==\n")
    assert re.findall(r"^([a-z-]+): \d", broken, re.MULTILINE) == [
        "extra-dimension",
        "prompt-trained",
        "masked-end",
        "trainable-embeddings",
        "checkpointing",
    ]
    assert mended.startswith("nothing found") and "graph    from layer 2" in mended
