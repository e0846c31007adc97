"""Qwen2.5-7B's exact shape with random weights, trained under a hard limit that the model does not fit.

    python3 dev.py bench seven-billion [--only top-5|adapters|everything] [--folder FOLDER] [--layers N]

Each way in a child process under a memory cgroup where one can be made (its limit counts every page), else
under RLIMIT_DATA; the pages of the model's files are dropped first. One step of 4,096 tokens. The folder
(15 GB, and as much again for the copies) is kept only if it was named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from common import best_seconds, record
from made import made_examples, qwen_folder

from talik.base.events import silent
from talik.base.system import configure_allocators, drop_pages
from talik.data.examples import Example
from talik.kernels.bf16_matmul import bf16_as_fp32
from talik.machine.device import without_bf16
from talik.machine.limits import hard_limit
from talik.machine.machine import this_machine
from talik.model.folder import ModelFolder
from talik.model.weights.safetensors_file import weight_files
from talik.plan.promise import Promise
from talik.plan.search import plan_run
from talik.plan.target import slack_of, target_of
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.simulate.simulation import subject_of
from talik.simulate.work import workload_of
from talik.training.loading import open_run_model
from talik.training.run.feed import run_step
from talik.training.run.loop import ScalarMonitor
from talik.training.step.step import prepare_top
from talik.training.step.top import World
from talik.training.trunk.trunk import trunk_states

GIB = 1 << 30
BESIDE = 128 << 20  # bytes of the limit that are not planned with
LENGTHS = (1024,) * 4
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "top-5": (3 * GIB, {"top_layers": 5}),
    "adapters": (3 * GIB, {"thaw": "all", "lora": "rank=16,alpha=32,targets=all"}),
    "everything": (
        5 * GIB,
        {"thaw": "all", "precision": "bf16-sr", "optimizer": "adafactor", "clip": "last"},
    ),
}


class Clock(ScalarMonitor):
    """Seconds by phase."""

    def __init__(self, promise: Promise) -> None:
        super().__init__(self._begin)
        self.seconds: Counter[str] = Counter()
        self._promise, self._now, self._since = promise, "", 0.0

    def _begin(self, name: str, size: int) -> None:
        if self._now:
            self.seconds[self._now] += time.perf_counter() - self._since
        self._promise.phase(name, size)  # as a run does
        self._now, self._since = name, time.perf_counter()


def child(way: str, folder: Path, place: Path, limited: bool) -> dict[str, Any]:
    """Plans, then runs a step within the way's limit."""
    limit, fields = WAYS[way]
    configure_allocators()
    recipe = Recipe(model=str(folder), data="-", batch_tokens=sum(LENGTHS), cache=str(place), **fields)
    examples = made_examples(LENGTHS)
    # Nothing is saved here. A cgroup counts page tables and file pages too, which no plan knows.
    target = target_of(this_machine("cpu"), memory=limit - BESIDE, disk=1 << 50)
    start = time.perf_counter()
    planned = plan_run(recipe, ModelFolder(folder), examples, target=target)
    row: dict[str, Any] = {"way": way, "limit": limit, "planning": time.perf_counter() - start}
    row |= {"promise": planned.peak.bytes, "plan": planned.plan.model_dump(), "fits": planned.fits}
    if planned.fits:
        free = contextlib.nullcontext(lambda: None)
        within = free if limited else hard_limit(torch.device("cpu"), limit)
        with Promise(planned.plan) as promise, within as promise.between:
            row |= one_step(recipe, planned.plan, folder, examples, place, promise)
        row["phases"] = promise.table()
        row["peak"] = max(sizes["measured"] for sizes in row["phases"].values())
        work = workload_of(examples, [], planned.plan, recipe, subject_of(recipe, ModelFolder(folder)).chain)
        simulated = sum(examples[i].length for step in work.steps for i in step)
        flops = sum(planned.simulation.flops[phase] for phase in ("forward", "loss", "backward"))
        row["flops"] = flops * sum(LENGTHS) / simulated  # of one step
    return row


def one_step(
    recipe: Recipe, plan: Plan, folder: Path, examples: list[Example], place: Path, promise: Promise
) -> dict[str, Any]:
    """Loads, runs the trunk and a step; what the step took.

    A later one is no faster: nothing is compiled, and weights are read anew in each.
    """
    promise.phase("load")  # which is when a limit begins
    loaded = open_run_model(recipe, plan, ModelFolder(folder))
    traffic, row = loaded.store.traffic, {}
    start = time.perf_counter()
    promise.phase("trunk")
    with bf16_as_fp32(), trunk_states(loaded, [examples], recipe, silent) as [states]:
        row["trunk_seconds"] = time.perf_counter() - start
        top = loaded.top()
        with loaded.working(top, place / "work") as scratch:
            prepare_top(top, recipe, loaded.store, scratch)
            before = vars_of(traffic)
            clock = Clock(promise)
            world = World(loaded.store, scratch, clock)
            run_step(
                top=top,
                examples=examples,
                indices=range(len(examples)),
                states=states,
                world=world,
                recipe=recipe,
                plan=plan,
                step=1,
                learning_rate=1e-5,
            )
            clock.phase("end")
            row["loss"] = clock.read("loss")
            print(way_line(clock), file=sys.stderr)
            spent = (now - then for now, then in zip(vars_of(traffic), before, strict=True))
            row |= dict(zip(("read", "waited", "written", "writing"), spent, strict=True))
            row["seconds"] = dict(clock.seconds)
    return row


def vars_of(traffic: Any) -> tuple[float, ...]:
    return traffic.bytes, traffic.waited, traffic.written, traffic.writing


def way_line(clock: Clock) -> str:
    return ", ".join(f"{name} {spent:.1f} s" for name, spent in clock.seconds.items())


@contextlib.contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """A memory cgroup with this limit, or None where none can be made."""
    for root, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"talik-bench-{os.getpid()}"
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield group
        finally:
            time.sleep(1)
            group.rmdir()
        return
    yield None


def matmul_rate() -> float:
    """FLOP/s of this machine's best product of a 7B layer's shapes: in bf16, or in fp32 without bf16."""
    dtype = torch.float32 if without_bf16() else torch.bfloat16
    x, w = torch.randn(2048, 3584, dtype=dtype), torch.randn(18944, 3584, dtype=dtype)
    return 2 * 2048 * 3584 * 18944 / best_seconds(lambda: x @ w.T)


def run(way: str, folder: Path) -> dict[str, Any]:
    """One way in a child process under its limit."""
    limit, _ = WAYS[way]
    for file in weight_files(folder):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            drop_pages(opened.fileno(), 0, 0)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place, cgroup(limit) as group:
        command = [sys.executable, __file__, "--child", way, str(folder), place, "yes" if group else "no"]

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=enter)
    row = {"way": way, "rc": done.returncode, "limited_by": "memory cgroup" if group else "RLIMIT_DATA"}
    if done.returncode:
        return {**row, "holds": False}
    row |= json.loads(done.stdout.splitlines()[-1])
    if not row["fits"]:
        return {**row, "holds": False}
    seconds = row["seconds"]
    row["compute_seconds"] = sum(seconds.get(phase, 0.0) for phase in ("forward", "loss", "backward"))
    row["share_of_rate"] = row["flops"] / row["compute_seconds"] / row["rate"] if "rate" in row else None
    row["waited_share"] = row["waited"] / (row["compute_seconds"] + seconds.get("update", 0.0))
    row["write_rate"] = row["written"] / row["writing"] if row["writing"] else None
    row["kept"] = row["peak"] <= row["promise"] + slack_of(row["promise"])
    return {**row, "holds": row["peak"] <= limit and row["kept"]}


def main(only: str | None, folder: Path, layers: int) -> None:
    qwen_folder(folder, layers)
    rows = []
    for way in [only] if only else WAYS:
        before = matmul_rate()
        row = run(way, folder)
        row["rate"] = max(before, matmul_rate())
        if row.get("fits"):
            row["share_of_rate"] = row["flops"] / row["compute_seconds"] / row["rate"]
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "plan"}, indent=1), file=sys.stderr)
    if layers == 28:
        record(f"seven-billion-{only}" if only else "seven-billion", {"lengths": LENGTHS, "rows": rows})


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5] == "yes")))
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--only", choices=list(WAYS))
        parser.add_argument("--folder", type=Path)
        parser.add_argument("--layers", type=int, default=28)
        given = parser.parse_args()
        with contextlib.ExitStack() as stack:
            where = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
            main(given.only, where, given.layers)
