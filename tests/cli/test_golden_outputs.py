"""The whole output of commands, compared with golden files. Numbers of the machine are replaced by a #."""

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
# Memory of the interpreter and the libraries: one value, so that planned peaks are the same everywhere.
PROGRAM = 300 << 20
_DURATIONS = (r"\bunder [\d.]+ s\b", r"\b\d[\d.]* (?:h|min|s)\b")
_SIZES = r"[\d,.]+ (?:B|KiB|MiB|GiB|TiB)\b"
# The output's numbers that depend on the machine or the process, by command; all others stay. Losses on other
# processors may differ in the last digits, and a finished run measured this process.
VARIES: dict[str, tuple[str, ...]] = {
    "plan": _DURATIONS,
    "plan-too-small": _DURATIONS,
    "explain-run": (_SIZES, r"[+-]?\d+\.\d %", r"(?<=measured # )\(\w+\)"),
    "eval": (r"\d+\.\d{2,}", r"\d+\.\d %"),
}
TABLES = ("explain-run", "eval")  # the number of spaces in a row varies with its numbers


@pytest.mark.parametrize("name", COMMANDS)
def test_the_whole_output_of_a_command(
    name: str,
    talik: Talik,
    model_folder: Path,
    rows: Path,
    run_folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("talik.plan.target.anonymous_bytes", lambda: PROGRAM)
    places = {"MODEL": str(model_folder), "ROWS": str(rows), "RUN": str(run_folder)}
    done = talik(*(places.get(word, word) for word in COMMANDS[name]))
    text = done.out if done.code == 0 else f"{done.out}exit code {done.code}\n"
    for word, place in places.items():
        text = text.replace(place, word)
    text = _replaced(text, VARIES.get(name, ()), merge_spaces=name in TABLES)
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def _replaced(text: str, patterns: tuple[str, ...], *, merge_spaces: bool = False) -> str:
    """The text with a # for each number that varies."""
    for pattern in patterns:
        text = re.sub(pattern, "#", text)
    return re.sub(r" {2,}", "  ", text) if merge_spaces else text


def test_only_what_varies_is_replaced() -> None:
    text = "time about under 0.1 s: trunk 4 min 10 s, disk 8.0 GiB  of 64.0 MiB, layers 2 to 3"
    assert (
        _replaced(text, VARIES["plan"]) == "time about #: trunk # #, disk 8.0 GiB  of 64.0 MiB, layers 2 to 3"
    )
    table = "planned 337.9 MiB,   off -8.5 %"
    assert _replaced(table, VARIES["explain-run"], merge_spaces=True) == "planned #,  off #"
    assert _replaced("a    1.5 MiB", ()) == "a    1.5 MiB"


def test_every_golden_file_belongs_to_a_command() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(COMMANDS)
