"""The whole output of commands, compared with golden files. Machine-dependent numbers are replaced by a #."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.commands import Talik

GOLDEN = Path(__file__).parents[1] / "golden" / "outputs"
PLAN = ("--top-layers", "2", "--precision", "fp32", "--memory", "8GiB", "--batch-tokens", "300")
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "MODEL", "--top-layers", "2"),
    "plan": ("plan", "MODEL", "ROWS", *PLAN),
    "plan-too-small": ("plan", "MODEL", "ROWS", *PLAN[:-4], "--memory", "64MiB"),
    "explain-habit": ("explain", "MODEL", "--habit", "full-logits", "--top-layers", "2"),
    "explain-labels": ("explain", "MODEL", "--habit", "masked-end"),
    "explain-run": ("explain", "RUN"),
    "preview": ("preview", "ROWS", "--model", "MODEL", "-n", "2"),
    "eval": ("eval", "RUN", "ROWS"),
}
# Bytes of the process and of the disk, seconds, bars and shares that depend on them.
_VARIES = (
    r"[\d,.]+ (?:B|KiB|MiB|GiB|TiB)\b",
    r"\b[\d.]+ (?:h|min|s)\b",
    r"[+-]?[\d.]+ %",
    r"#+\.*|\.{5,}",
    r"--memory \d+MiB",
    r"(?<=measured # )\(\w+\)",
    r"\d+\.\d{2,}",
)
EXACT = ("inspect", "preview", "explain-labels")  # nothing in them depends on the machine


@pytest.mark.parametrize("name", COMMANDS)
def test_the_whole_output_of_a_command(
    name: str,
    talik: Talik,
    model_folder: Path,
    rows: Path,
    run_folder: Path,
    request: pytest.FixtureRequest,
) -> None:
    places = {"MODEL": str(model_folder), "ROWS": str(rows), "RUN": str(run_folder)}
    done = talik(*(places.get(word, word) for word in COMMANDS[name]))
    text = done.out if done.code == 0 else f"{done.out}exit code {done.code}\n"
    for word, place in places.items():
        text = text.replace(place, word)
    if name not in EXACT:
        text = _without_sizes(text)
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def _without_sizes(text: str) -> str:
    for pattern in _VARIES:
        text = re.sub(pattern, "#", text)
    return re.sub(r" {2,}", "  ", text)
