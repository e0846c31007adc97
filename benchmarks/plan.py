"""The simulation beside torch's own allocator: the same run on fake tensors and, in a child, on real ones.

python3 dev.py bench plan [CASE ...]

The allocator's peaks are the sums of the allocations that torch's profiler saw, kernels' own included. Blocks
are read in the calling thread, where the profiler looks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import torch
import transformers
from common import record
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.tiny_models import tiny_model
from talik.data.examples import Example, Span
from talik.data.reading.rows import Place
from talik.kernels.bf16_matmul import bf16_as_fp32
from talik.model.folder import ModelFolder
from talik.model.weights.weights import Weights
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.simulate.simulation import Subject, Workload, rehearse, simulate, subject_of
from talik.training.trunk.cache import groups_of

NAMES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt2", "gpt_neox", "opt"),
    *("granite", "cohere", "olmo2", "starcoder2", "qwen3_moe", "mixtral", "deepseek_v3", "mamba2"),
)
WAYS: tuple[dict[str, Any], ...] = (
    {"precision": "fp32", "recompute": False, "trunk": "streamed", "top": 2},
    {"precision": "bf16", "recompute": True, "trunk": "resident", "top": 4},
)
MORE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2", {"precision": "bf16-sr", "recompute": False, "trunk": "streamed", "top": 1}),
    ("llama", {"precision": "bf16-sr", "recompute": True, "trunk": "resident", "top": 3}),
    ("qwen3", {"precision": "fp32", "recompute": True, "trunk": "resident", "top": 4}),
    ("mixtral", {"precision": "fp32", "recompute": True, "trunk": "streamed", "top": 4}),
)
LENGTHS = (192, 120, 120, 64, 37)
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 8192, "max_position_embeddings": 1024}

OWN = {"mamba2": {"num_heads": 64, "head_dim": 16}}
EAGER = ("gpt2", "gemma2", "mamba2")  # no attention of torch's own in these


def examples() -> list[Example]:
    """A few examples of unlike lengths, the last half of each trained."""
    made = []
    for length in LENGTHS:
        spans = (Span(0, length // 2, False), Span(length // 2, length, True))
        ids = array("i", ((7 * place + length) % 250 + 3 for place in range(length)))
        made.append(Example(ids, spans, Place("made.jsonl", 1)))
    return made


def prepare(name: str, way: dict[str, Any], folder: Path) -> tuple[Subject, Plan, Workload]:
    """What both sides run."""
    recipe = Recipe(model=str(folder), data="-", top_layers=way["top"], precision=way["precision"])
    subject = subject_of(recipe, ModelFolder(folder))
    layers = len(subject.chain.layers)
    cut, _ = subject.chain.lowest_cut(layers - way["top"])
    plan = Plan(
        device="cpu",
        threads=torch.get_num_threads(),
        cut=cut,
        layers=layers,
        trunk=way["trunk"],
        top="resident",
        cache="disk",
        trunk_batch_tokens=1024,
        hidden_bytes=1 << 30,
        micro_batch_tokens=1024,
        loss_chunk=128,
        recompute=way["recompute"],
    )
    made = examples()
    return subject, plan, Workload(made, groups_of(made, 1024), [[0, 1, 2], [3, 4, 0]], [1, 2])


def save(name: str, folder: Path) -> None:
    """A random model of a family, wide enough that its tensors count."""
    torch.manual_seed(0)
    attention = "eager" if name in EAGER else "sdpa"
    tiny_model(name, attention=attention, **SIZES, **OWN.get(name, {})).save_pretrained(folder)


class Phases:
    """A log that tells the profiler where phases begin."""

    device = "cpu"

    def __init__(self) -> None:
        self._open: Any = None

    def phase(self, name: str) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = record_function(f"phase {name}")
        self._open.__enter__()

    def unnamed(self) -> int:
        return 0

    def mark(self, tensors: Any, cause: str) -> None:
        pass


def real(name: str, way: dict[str, Any], folder: Path) -> dict[str, int]:
    """The allocator's peak of each phase."""
    subject, plan, work = prepare(name, way, folder)
    weights = Weights(subject.chain.model, folder)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        log = Phases()
        rehearse(subject, weights, plan, work, log, layers=plan.cut)
        log.phase("end")
        log.phase("end")
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peaks: dict[str, int] = {}
    level, phase = 0, "load"
    for event in events:
        if event.name().startswith("phase "):
            phase = event.name().removeprefix("phase ")
            peaks[phase] = max(peaks.get(phase, 0), level)
        elif event.name() == "[memory]":
            level += event.nbytes()
            peaks[phase] = max(peaks.get(phase, 0), level)
    peaks.pop("end")
    return peaks


def case(name: str, way: dict[str, Any]) -> dict[str, Any]:
    """Both sides of one configuration."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save(name, folder)
        subject, plan, work = prepare(name, way, folder)
        start = time.perf_counter()
        simulated = {peak.phase: peak.bytes for peak in simulate(subject, plan, work).phases}
        seconds = time.perf_counter() - start
        command = [sys.executable, __file__, "--real", name, json.dumps(way), place]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        if out.returncode:
            return {"model": name, **way, "failed": out.stderr.strip().splitlines()[-1]}
        allocated = json.loads(out.stdout.splitlines()[-1])
    phases = {phase: [simulated.get(phase, 0), size] for phase, size in allocated.items() if phase != "save"}
    top, peak = max(simulated.values()), max(allocated.values())
    holds = within(top, peak, 0.001) and all(within(*pair, 0.01) for pair in phases.values())
    return {
        "model": name,
        **way,
        "simulated": top,
        "allocated": peak,
        "error_percent": round(100 * (top / peak - 1), 4),
        "phases": phases,
        "holds": holds,
        "seconds": round(seconds, 1),
    }


def within(one: int, other: int, share: float) -> bool:
    """Whether two sizes are less than a share, or 1 MiB, apart."""
    return abs(one - other) <= max(share * other, 1 << 20)


def main(arguments: list[str]) -> None:
    cases = [(name, way) for name in NAMES for way in WAYS] + list(MORE)
    if arguments:
        cases = [(name, way) for name, way in cases if name in arguments]
    rows = []
    for name, way in cases:
        try:
            row = case(name, way)
        except Exception as error:
            row = {"model": name, **way, "failed": f"{type(error).__name__}: {error}"}
        rows.append(row)
        far = {p: pair for p, pair in row.get("phases", {}).items() if not within(*pair, 0.01)}
        shown = (
            row.get("failed") or f"{row['simulated']:,} {row['allocated']:,} {row['error_percent']} % {far}"
        )
        print(f"{name} {way} {shown}", file=sys.stderr)
    if not arguments:
        holds = sum(row.get("holds", False) for row in rows)
        record("plan", {"configurations": len(rows), "hold": holds, "rows": rows})


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with bf16_as_fp32():
        if sys.argv[1:2] == ["--real"]:
            print(json.dumps(real(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))))
        else:
            main(sys.argv[1:])
