"""Small models and tokenizers, made on the spot: no test needs a hub, a GPU or another folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.models import CHATML, QUESTIONS, SMALL, make_model
from talik.cli.main import main
from talik.machine.machine import this_machine

ROOT = Path(__file__).parent
# Files of tests that take more than ten seconds together on one core.
SLOW = {
    *("architecture/test_docs", "architecture/test_examples", "check/test_check"),
    *("data/preparing/test_prepare", "exporting/test_export", "exporting/test_export_files"),
    *("exporting/test_old_readers", "model/chain/test_chain", "model/chain/test_mechanisms"),
    *("model/chain/test_positions", "model/chain/test_runs", "plan/test_promise", "plan/test_search"),
    *("simulate/test_simulate", "simulate/test_work", "training/run/test_training"),
    *("training/step/test_gradients", "training/step/test_streamed", "training/test_adapters"),
    *("training/test_drop_in", "training/trunk/test_trunk"),
}


@pytest.fixture(autouse=True)
def shapes_checked(request: pytest.FixtureRequest) -> None:
    """Shapes in signatures are checked by the tests of the packages that have them.

    Whole runs and plans call the same functions, and would spend two thirds of their time on it.
    """
    checked = {"data", "model", "training"} & set(request.path.parts)
    whole = request.node.get_closest_marker("whole_run") is not None
    jaxtyping.config.update("jaxtyping_disable", whole or not checked)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests run side by side, so each takes one core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def measured_in_no_time() -> Iterator[None]:
    """Rates are taken from two repetitions: no test asks how fast this computer is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("talik.machine.rates.SECONDS", 0.0)
        yield


@pytest.fixture(scope="session")
def machine_json(tmp_path_factory: pytest.TempPathFactory, measured_in_no_time: None) -> str:
    """A machine.json, so that the machine is measured once and not by every test."""
    home = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALIK_HOME", str(home))
        this_machine()
    return (home / "machine.json").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def own_home(
    tmp_path_factory: pytest.TempPathFactory, machine_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test touches the user's caches."""
    home = tmp_path_factory.mktemp("home")
    (home / "machine.json").write_text(machine_json, encoding="utf-8")
    monkeypatch.setenv("TALIK_HOME", str(home))


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Any]:
    """`build_model("qwen2", tie_word_embeddings=True)`."""
    return make_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with ChatML; its pad token also ends a turn."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL["vocab_size"],
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text for pair in QUESTIONS for text in pair], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A small Qwen2 with tied embeddings and its tokenizer, as a plain Transformers folder in bf16."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("qwen2", dtype=torch.bfloat16, tie_word_embeddings=True, eos_token_id=2).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty questions and answers as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [json.dumps({"input": question, "output": answer}) + "\n" for question, answer in QUESTIONS]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run_folder(model_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the small model in fp32 with questions held out; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = (
        "--top-layers 2 --precision fp32 --epochs 1 --batch-tokens 300 --held-out 0.2 --learning-rate 0.01"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALIK_HOME", str(tmp_path_factory.mktemp("home")))
        assert main(["train", str(model_folder), str(rows), "-o", str(folder), *options.split()]) == 0
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the files that `dev.py test --quick` leaves out."""
    for item in items:
        if item.path.relative_to(ROOT).with_suffix("").as_posix() in SLOW:
            item.add_marker("slow")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")
