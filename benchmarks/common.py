"""What the benchmarks share: the machine's own limit, and a record of what was measured."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Enough to know what the numbers were measured on."""
    return {
        "system": platform.system(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit that was measured, with a + if the tree was changed."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=RESULTS.parent, check=False
        )
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def best_seconds(function: Callable[[], Any], times: int = 3) -> float:
    """The shortest of a few runs, after one that warms up."""
    function()
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        spent.append(time.perf_counter() - start)
    return min(spent)


def record(name: str, values: dict[str, Any]) -> None:
    """Prints what was measured and keeps it in results/NAME.json."""
    kept = {"machine": machine(), "commit": commit(), **values}
    print(json.dumps(kept, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
