"""Random runs under random limits: those that a plan accepts must finish, those that it refuses must break.

python3 dev.py bench limits [COUNT] [SEED]

Every pair is a process of its own. It plans a random run without a limit, draws a limit near what that takes
or near what the thriftiest way takes, plans again, and then runs: what is accepted under the hard limit of
its promise and the slack (`--enforce`), what is refused by more than the slack under the limit that refused
it, by the same means. Between the two nothing is asked for.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from common import record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.small_tokenizers import make_tokenizer
from helpers.tiny_models import tiny_model
from talik.base.errors import DoesNotFitError
from talik.base.system import configure_allocators
from talik.data.dataset import read_sets
from talik.machine.machine import this_machine
from talik.model.folder import ModelFolder
from talik.model.tokenizer import load_tokenizer
from talik.plan.changes import ThriftiestWay
from talik.plan.search import plan_run
from talik.plan.target import slack_of, target_of
from talik.recipe.recipe import Recipe
from talik.run import train

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "mixtral", "phi3", "olmo2")
HIDDEN = (512, 768, 1024)


def prepare(folder: Path, draw: random.Random) -> tuple[Recipe, str]:
    """A random model with a tokenizer, random rows, and a recipe for them."""
    family, hidden = draw.choice(FAMILIES), draw.choice(HIDDEN)
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "vocab_size": draw.choice((4096, 16384, 32768)),
        "max_position_embeddings": 2048,
    }
    torch.manual_seed(draw.randrange(1 << 30))
    attention = "eager" if family in ("gpt2", "gemma2") else "sdpa"
    tiny_model(family, attention=attention, **sizes).save_pretrained(folder)
    make_tokenizer("chatml").save_pretrained(folder)
    longest = draw.choice((40, 120, 300))
    rows = [
        {
            "input": "What is 2 + 3? " * draw.randint(1, longest // 10),
            "output": "It is 5. " * draw.randint(1, 20),
        }
        for _ in range(64)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = {
        "thaw": f"top.{draw.randint(1, 4)},norm",  # and the head in one run of three, below
        "precision": draw.choice(("fp32", "fp32", "bf16-sr")),
        "batch_tokens": draw.choice((1024, 2048, 4096)),
        "head": draw.choice(("", "", ",head")),
        "held_out": draw.choice((0.0, 0.2)),
        "steps": draw.choice((2, 8)),  # the second passes over all lengths more than once
        "max_length": 2048,
    }
    fields["thaw"] += fields.pop("head")
    recipe = Recipe.model_validate(
        {"model": str(folder), "data": str(folder / "rows.jsonl"), "cache": str(folder / "cache"), **fields}
    )
    return recipe, f"{family} {hidden} x {sizes['vocab_size']}, {fields}"


def pair(seed: int, folder: Path) -> dict[str, Any]:
    """One pair of run and limit, and what became of it."""
    draw = random.Random(seed)
    recipe, what = prepare(folder, draw)
    configure_allocators()
    sets = read_sets(recipe, load_tokenizer(folder))
    examples, evaluated = (data.examples if data else [] for data in sets)
    machine = this_machine("cpu", measure=False)
    free = plan_run(recipe, ModelFolder(folder), examples, evaluated, target=target_of(machine))
    anchor = free.peak.bytes
    if draw.choice((False, True)):
        anchor = ThriftiestWay(ModelFolder(folder), (examples, evaluated), target_of(machine)).peak(recipe)
    limit = int(draw.uniform(0.6, 1.4) * anchor) + slack_of(anchor)
    planned = plan_run(
        recipe, ModelFolder(folder), examples, evaluated, target=target_of(machine, memory=limit)
    )
    promise = planned.peak.bytes
    row = {"seed": seed, "run": what, "limit": limit, "promise": promise, "accepted": planned.fits}
    if not planned.fits and promise <= limit + slack_of(promise):
        return {**row, "asked": False, "holds": True}
    try:
        if planned.fits:
            result = train(recipe, folder / "run", plan=planned.plan, enforce=True)
            took = max(of_phase["measured"] for of_phase in result.memory.values())
            near = abs(took - promise) <= slack_of(promise)
            return {**row, "asked": True, "holds": True, "took": took, "near": near}
        at_most = planned.plan.model_copy(update={"promised": {"peak": planned.target.most}})
        train(recipe, folder / "run", plan=at_most, enforce=True)
        return {**row, "asked": True, "holds": False, "why": "finished under the limit"}
    except DoesNotFitError as error:
        return {**row, "asked": True, "holds": not planned.fits, "why": error.problem}


def in_a_process(seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, "--pair", str(seed), place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        row = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        row = {"seed": seed, "asked": True, "holds": False, "why": f"rc {done.returncode}: {last}"}
    row["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(row), file=sys.stderr)
    return row


def main(count: int, first: int) -> None:
    with ThreadPoolExecutor(2) as pool:  # memory is asked for here, not time
        rows = list(pool.map(in_a_process, range(first, first + count)))
    counts = {
        "pairs": count,
        "accepted": sum(row.get("accepted", False) for row in rows),
        "refused and forced": sum(row["asked"] and not row.get("accepted", True) for row in rows),
        "within the slack, not asked": sum(not row["asked"] for row in rows),
        "hold": sum(row["holds"] for row in rows),
        "took what was promised, to within the slack": sum(row.get("near", False) for row in rows),
    }
    record("limits", {**counts, "rows": rows})


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1:2] == ["--pair"]:
        print(json.dumps(pair(int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main(*(int(argument) for argument in [*sys.argv[1:], *("60", "0")[len(sys.argv) - 1 :]]))
