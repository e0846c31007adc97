"""Whether memory grows with depth: every weight of models of 4 to 32 layers trained, a few of them in memory.

    python3 dev.py bench depth

Each depth in a process of its own, a step of 2,048 tokens, layers' inputs and optimizer state on disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from common import record
from made import made_examples, qwen_folder
from seven_billion import one_step

from talik.base.system import configure_allocators
from talik.machine.machine import this_machine
from talik.model.folder import ModelFolder
from talik.plan.promise import Promise
from talik.plan.search import Search
from talik.plan.target import target_of
from talik.plan.ways import Way
from talik.recipe.recipe import Recipe
from talik.simulate.simulation import subject_of

DEPTHS = (4, 8, 16, 32)
LENGTHS = (512,) * 4
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "vocab_size": 32768,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}


def child(folder: Path, place: Path) -> dict[str, Any]:
    """The promise of the way that takes least, and what it takes."""
    configure_allocators()
    fields = {"thaw": "all", "precision": "bf16-sr", "optimizer": "adafactor", "clip": "last"}
    recipe = Recipe.model_validate(
        {"model": str(folder), "data": "-", "batch_tokens": sum(LENGTHS), "cache": str(place), **fields}
    )
    examples = made_examples(LENGTHS, SIZES["vocab_size"])
    target = target_of(this_machine("cpu", measure=False))
    search = Search(subject_of(recipe, ModelFolder(folder)), examples, [], target)
    way = Way(top="streamed", state="disk", inputs="disk", micro_batch_tokens=1024)
    tried = search.simulate_plan(way.apply(search.first))
    promised = {peak.phase: peak.bytes for peak in tried.phases}
    plan = tried.plan.model_copy(update={"promised": promised})
    with Promise(plan) as promise:
        one_step(recipe, plan, folder, examples, place, promise)
    phases = promise.table()
    peak = max(sizes["measured"] for sizes in phases.values())
    return {"promise": tried.peak.bytes, "peak": peak, "phases": phases}


def main() -> None:
    rows = []
    for layers in DEPTHS:
        with tempfile.TemporaryDirectory() as place:
            folder = qwen_folder(Path(place) / "model", layers, **SIZES)
            work = Path(place) / "work"
            work.mkdir()
            command = [sys.executable, __file__, "--child", str(folder), str(work)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            weights = (folder / "model.safetensors").stat().st_size
        rows.append({"layers": layers, "weights": weights, **json.loads(done.stdout.splitlines()[-1])})
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "phases"}), file=sys.stderr)
    peaks = [row["peak"] for row in rows]
    record("depth", {"largest over smallest peak": max(peaks) / min(peaks), "rows": rows})


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
