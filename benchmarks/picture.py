"""docs/memory.svg: a loop that runs out of memory beside Talik's run of the same model within the same limit.

    python3 dev.py bench picture [FILE]

Every height is simulated by the commands that users have, from config.json alone: `talik explain --habit` for
the loop, `talik plan` for the run. The same numbers make the same file.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
import yaml
from fits import MODELS
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Path2D

from talik.cli import main as talik

GIB = 1 << 30
MODEL, LIMIT, TOP, LENGTH = "Qwen2.5-7B-Instruct", 8, 5, 1024  # LIMIT in GiB
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters: paths would make the file four times as large
    "svg.hashsalt": "talik",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
BAD, GOOD, SOFT = "#b3273b", "#1d7a5a", "#555555"
WEIGHTS, COPIES, ACTIVATIONS = "#2f6db3", "#d1495b", "#f2a541"
FADED = 0.28  # opacity of what is beyond the limit
GROUPS = {  # of a plan's causes, from below
    "program": ("Python and PyTorch", "#9aa0a6"),
    "weights frozen": ("weights", WEIGHTS),
    "weights trained": ("weights", WEIGHTS),
    "optimizer state": ("optimizer state", "#2a9d77"),
    "gradients": ("gradients", "#7b4fa6"),
}
OTHERS = ("activations, workspace", ACTIVATIONS)
PHASES = ("load", "trunk", "forward", "loss", "backward", "update")
NOTE = (
    "Simulated from config.json: bf16, AdamW, one row of {length:,} tokens a step. Left: tensors alone; "
    "embeddings, head and the top layers are on the device, which has\nnothing else in it. Right: layers "
    "come from the disk one after the other, and the optimizer state stays there."
)


def asked(*arguments: str) -> dict[str, Any]:
    """What a command prints with --json."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = talik([*arguments, "--json"])
    if code:
        raise RuntimeError(f"talik {' '.join(arguments)} ended with {code}")
    return json.loads(out.getvalue())


def simulated(place: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The loop with offloaded layers, the same loop with all weights in memory, and Talik's run."""
    folder, machine = place / MODEL, place / "machine.yaml"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODELS[MODEL][1]), encoding="utf-8")
    machine.write_text(yaml.safe_dump({"device": "cpu", "memory": LIMIT * GIB, "free": LIMIT * GIB}))
    habit = ("explain", str(folder), "--memory", f"{LIMIT}GiB", "--top-layers", str(TOP), "--habit")
    sizes = ("--max-length", str(LENGTH), "--batch-tokens", str(LENGTH))
    plan = ("plan", str(folder), "--top-layers", str(TOP), "--machine", str(machine), *sizes)
    return asked(*habit, "offloaded"), asked(*habit, "trainable-embeddings"), asked(*plan)


def draw_loop(axes: Axes, offloaded: dict[str, Any], resident: dict[str, Any]) -> None:
    """What is alive after the forward of each layer, until memory is full and as it would go on.

    Beyond the embeddings the loop with all weights in memory adds activations; what the one with offloaded
    layers adds beside those are copies of weights.
    """
    levels, others = (list(loop["habit"]["levels"].values()) for loop in (offloaded, resident))
    first, full = levels[0], int(re.findall(r"forward layer (\d+)", offloaded["habit"]["full_at"])[0])
    layers = len(levels) - 1
    activations = [level - others[0] for level in others[1:]]
    copies = [level - first - kept for level, kept in zip(levels[1:], activations, strict=True)]
    parts = ((WEIGHTS, [first] * layers), (ACTIVATIONS, activations), (COPIES, copies))
    draw_bars(axes, parts, range(full + 1), width=1)
    draw_bars(axes, parts, range(full + 1, layers), width=1, alpha=FADED)
    axes.set_xlim(-0.7, layers - 0.3)
    axes.set_xticks(range(0, layers, 3))
    axes.set_xlabel("first forward pass, layer by layer")
    axes.set_ylabel("memory, GiB")
    axes.annotate(
        f"out of memory\nin layer {full} of {layers}",
        (full, levels[full + 1] / GIB + 0.1),
        (full - 2.4, 13.4),
        ha="center",
        color=BAD,
        fontweight="bold",
        fontsize=12,
        arrowprops={"arrowstyle": "-|>", "color": BAD, "linewidth": 1.6},
    )
    phases = offloaded["habit"]["phases"]
    highest = max(phases, key=phases.__getitem__)
    words = f"it would go on to {phases[highest] / GIB:.0f} GiB\nin the {highest}"
    axes.text(15.2, 17.4, words, ha="center", color=SOFT, fontsize=9)
    inside: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9}
    axes.text(full / 2, first / GIB / 2, "weights on\nthe device", color="white", **inside)
    words = (
        "copies of frozen layers:\nautograd keeps each of them, because\nthe embeddings require a gradient"
    )
    axes.text(20.3, 11.0, words, color=BAD, **inside)
    axes.text(21.2, 5.5, "activations", color="#8a5200", **inside)


def draw_run(axes: Axes, plan: dict[str, Any]) -> None:
    """The peak of each phase of the run, by cause."""
    causes = {phase["name"]: phase["causes"] for phase in plan["phases"]}
    groups = dict.fromkeys([*GROUPS.values(), OTHERS])
    heights = {group: [0] * len(PHASES) for group in groups}
    for number, name in enumerate(PHASES):
        for cause, size in causes[name].items():
            heights[GROUPS.get(cause, OTHERS)][number] += size
    draw_bars(axes, [(colour, sizes) for (_, colour), sizes in heights.items()], range(len(PHASES)))
    for number, sizes in enumerate(zip(*heights.values(), strict=True)):
        axes.text(number, sum(sizes) / GIB + 0.2, f"{sum(sizes) / GIB:.1f}", ha="center")
    shown = [Patch(color=colour, label=label) for (label, colour), sizes in heights.items() if any(sizes)]
    axes.legend(handles=shown[::-1], loc="upper right", frameon=False, fontsize=9)
    axes.set_xlim(-0.7, len(PHASES) - 0.3)
    axes.set_xticks(range(len(PHASES)), PHASES)
    axes.set_xlabel("the whole run, phase by phase: the peak of each")


def draw_bars(
    axes: Axes,
    parts: Sequence[tuple[str, Sequence[int]]],
    places: Iterable[int],
    *,
    width: float = 0.84,
    alpha: float = 1.0,
) -> None:
    """Draws bars of bytes at these places, stacked by colour; each colour is one path."""
    below = [0.0] * len(parts[0][1])
    for colour, sizes in parts:
        bars = []
        for place in places:
            bottom, top = below[place], below[place] + sizes[place] / GIB
            one, other = place - width / 2, place + width / 2
            bars.append(Path2D([(one, bottom), (one, top), (other, top), (other, bottom), (one, bottom)]))
            below[place] = top
        whole = Path2D.make_compound_path(*bars)
        axes.add_patch(PathPatch(whole, facecolor=colour, alpha=alpha, linewidth=0))


def draw(found: tuple[dict[str, Any], dict[str, Any], dict[str, Any]], file: Path) -> None:
    """Both, with the limit across them."""
    offloaded, resident, plan = found
    layers, peak = len(offloaded["habit"]["levels"]) - 1, plan["peak_bytes"]["cpu"] / GIB
    with rc_context(SETTINGS):
        figure = Figure(figsize=(10.4, 4.4), layout="constrained", facecolor="white")
        title = f"{MODEL}: training the top {TOP} of {layers} layers with {LIMIT} GiB of memory"
        figure.suptitle(title, fontsize=13.5, fontweight="bold")
        figure.supxlabel(NOTE.format(length=LENGTH), fontsize=8, color=SOFT, ha="left", x=0.01)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.3, 1))
        draw_loop(left, offloaded, resident)
        draw_run(right, plan)
        words = "the usual loop: lower layers frozen and offloaded"
        left.set_title(words, fontsize=11, color=BAD, fontweight="bold")
        words = f"Talik: its peak is {peak:.1f} GiB"
        right.set_title(words, fontsize=11, color=GOOD, fontweight="bold")
        for axes in (left, right):
            axes.axhline(LIMIT, color="black", linestyle="--", linewidth=1.4)
            axes.set_ylim(0, 20)
            axes.set_yticks(range(0, 21, 4))
            axes.tick_params(length=0)
        right.text(len(PHASES) - 0.35, LIMIT + 0.25, f"limit: {LIMIT} GiB", ha="right", fontweight="bold")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def main(file: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        found = simulated(Path(made))
    draw(found, file)
    print(f"{file}: {file.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "docs" / "memory.svg")
