"""Pictures of small logs: their contents, their size, and errors."""

from __future__ import annotations

import random
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from talik.base.errors import UsageError
from talik.plan.picture import COLOURS, POINTS, phases_of, thinned, write_picture
from talik.simulate.account import account, levels
from talik.simulate.storage_log import CAUSES, Storage, StorageLog

MIB = 1 << 20


def log_of(phases: list[tuple[str, list[tuple[str, int] | int]]]) -> StorageLog:
    """A log of storages (cause, bytes) by phase; a number frees that storage."""
    log = StorageLog()
    log.marks = []
    for phase, events in phases:
        log.marks.append((len(log.events), phase))
        for event in events:
            if isinstance(event, int):
                log.events.append(~event)
            else:
                log.events.append(len(log.births))
                log.births.append(Storage(event[1], phase, "", "aten::empty", (1,), event[0]))
    return log


def long_log(count: int = 60_000) -> StorageLog:
    """Storages of all causes, a few alive at a time, and one event with far more than any other."""
    chance = random.Random(0)
    events: list[tuple[str, int] | int] = []
    for key in range(count):
        size = 1 << 40 if key == count // 3 else chance.randrange(1 << 28)
        events.append((CAUSES[key % len(CAUSES)], size))
        if key >= 20:
            events.append(key - 20 if key % 2 else key)
    third = len(events) // 3
    return log_of([("forward", events[:third]), ("backward", events[third:])])


SMALL = log_of(
    [
        ("load", [("weights frozen", 300 * MIB), ("weights trained", 100 * MIB)]),
        ("forward", [("saved activations", 200 * MIB)]),
        ("backward", [("gradients", 50 * MIB), 2, 3, 0, 1]),
    ]
)


def test_the_legend_names_the_causes_in_order_and_the_axis_its_unit(tmp_path: Path) -> None:
    write_picture(account(SMALL), tmp_path / "run.svg", budget=700 * MIB, program=10 * MIB)
    tree = ET.parse(tmp_path / "run.svg")
    texts = [text.text or "" for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    shown = ["program", "weights frozen", "weights trained", "gradients", "saved activations"]
    assert [text for text in texts if text in (*CAUSES, "budget")] == [*shown, "budget"]
    assert {"load", "forward", "backward", "memory (MiB)"} <= set(texts)
    write_picture(account(SMALL), tmp_path / "more.svg", budget=2 << 30)
    assert "memory (GiB)" in (tmp_path / "more.svg").read_text(encoding="utf-8")


def test_the_same_run_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        write_picture(account(SMALL), tmp_path / name, budget=1 << 30)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_png_is_a_png(tmp_path: Path) -> None:
    write_picture(account(SMALL), tmp_path / "run.PNG", budget=1 << 30)
    assert (tmp_path / "run.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_long_run_is_thinned_out_and_keeps_its_peaks(tmp_path: Path) -> None:
    log = long_log()
    numbers, stacked = thinned(log, program=5)
    totals = [total for _, _, total in levels(log)]
    assert len(numbers) == len(stacked) <= POINTS
    assert numbers == sorted(numbers)
    shown = [sum(causes.values()) for causes in stacked]
    assert shown == [totals[number] + 5 for number in numbers]
    assert max(shown) == max(totals) + 5
    in_backward = [total for _, phase, total in levels(log) if phase == "backward"]
    assert max(totals[number] for number in numbers if number >= log.marks[1][0]) == max(in_backward)
    write_picture(account(log), tmp_path / "run.svg", budget=1 << 33)
    assert 20_000 < (tmp_path / "run.svg").stat().st_size < 500_000


def test_the_end_of_the_simulation_is_not_in_it() -> None:
    numbers, stacked = thinned(SMALL)
    assert numbers == [0, 1, 2, 3]
    assert stacked[-1]["weights frozen"] == 300 * MIB


def test_short_phases_are_named_together() -> None:
    micro: list[tuple[str, list[tuple[str, int] | int]]] = [
        (phase, [("workspace", 1)]) for _ in range(60) for phase in ("forward", "loss", "backward")
    ]
    some: list[tuple[str, int] | int] = [("workspace", 1)] * 40
    log = log_of([("load", some), ("load", some), ("trunk", some[:2]), *micro, ("update", some)])
    assert phases_of(log) == [
        (0, 80, "load"),
        (80, 82, "trunk"),
        (82, 262, "forward, loss, backward"),
        (262, 302, "update"),
    ]


def test_every_cause_has_its_own_colour() -> None:
    assert set(CAUSES) <= set(COLOURS)
    assert len(set(COLOURS.values())) == len(COLOURS)


@pytest.mark.parametrize("name", ["run.pdf", "run"])
def test_another_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        write_picture(account(SMALL), tmp_path / name, budget=1)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install \"talik\[picture\]\""):
        write_picture(account(SMALL), tmp_path / "run.svg", budget=1)
    assert not list(tmp_path.iterdir())
