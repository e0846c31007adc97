"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from talik.base.files import format_bytes
from talik.machine.machine import Machine
from talik.plan.planned import Planned
from talik.plan.target import slack_of
from talik.plan.ways import way_of
from talik.recipe.recipe import Recipe

WIDTH = 40  # characters of a bar for the whole budget


def plan_text(planned: Planned) -> str:
    """The verdict, a bar for every phase, the causes of the peak, the chosen way, and the refused ones."""
    parts = (_verdict, _bars, _causes, _costs, _ways)
    return "\n\n".join("\n".join(part(planned)) for part in parts)


def short_text(planned: Planned) -> list[str]:
    """The verdict and the chosen way."""
    estimate = [planned.estimate] if planned.estimate else []
    return [next(_verdict(planned)), *estimate, next(_ways(planned)), *_costs(planned)]


def slow_precision(recipe: Recipe, machine: Machine) -> str | None:
    """A note if the machine computes bf16 much more slowly than fp32."""
    slow, fast = (machine.rates.matmul[precision] / 1e9 for precision in ("bf16", "fp32"))
    if recipe.precision == "fp32" or not (machine.without_bf16 or slow < fast / 2):
        return None
    if machine.without_bf16:
        return (
            f"this processor has no instructions for bf16 ({slow:.0f} GFLOP/s): bf16 matrices are "
            f"multiplied as fp32 ones ({fast:.0f})"
        )
    return (
        f"this machine multiplies bf16 matrices at {slow:.0f} GFLOP/s and fp32 ones at {fast:.0f}: "
        "--precision fp32 would be faster, with twice the memory for the weights"
    )


def _verdict(planned: Planned) -> Iterator[str]:
    peak = planned.peak
    where = f"{peak.phase}, {peak.block}" if peak.block else peak.phase
    yield (
        f"{'fits' if planned.fits else 'does not fit'}: {format_bytes(peak.bytes)} ({where}) and a margin "
        f"of {format_bytes(slack_of(peak.bytes))}, of {format_bytes(planned.target.memory)} "
        f"({planned.plan.device})"
    )
    if planned.estimate:
        yield planned.estimate
    if planned.least is not None:
        yield f"between {format_bytes(planned.least)} and this, by what the router chooses"
    if planned.ram_missing:
        yield f"the host RAM lacks {format_bytes(planned.ram_missing)}"
    if planned.disk_missing:
        yield f"the disk lacks {format_bytes(planned.disk_missing)}"
    if planned.assumed:
        yield f"assumed: {planned.assumed}"
    yield from planned.target.machine.notes


def _bars(planned: Planned) -> Iterator[str]:
    for phase in planned.phases:
        filled = min(WIDTH, round(WIDTH * phase.bytes / max(1, planned.target.memory)))
        block = f"  {phase.block}" if phase.block else ""
        yield f"{phase.phase:<9}{'#' * filled:.<{WIDTH}} {format_bytes(phase.bytes):>9}{block}"


def _causes(planned: Planned) -> Iterator[str]:
    peak = planned.peak
    yield f"at the peak ({peak.phase}{f', {peak.block}' if peak.block else ''}):"
    for cause, size in sorted(peak.causes.items(), key=lambda item: -item[1]):
        if size >= 1 << 20:
            yield f"  {cause:<18}{format_bytes(size):>10}"


def _costs(planned: Planned) -> Iterator[str]:
    seconds = planned.seconds
    uses = " + ".join(_disk_use(planned, name, size) for name, size in planned.disk.items())
    yield (
        f"time about {_time(seconds.total)}: trunk {_time(seconds.trunk)}, an epoch {_time(seconds.epoch)}; "
        f"disk {format_bytes(planned.disk_bytes)} ({uses})"
    )


def _disk_use(planned: Planned, name: str, size: int) -> str:
    if name != "checkpoints":
        return f"{name} {format_bytes(size)}"
    each, count = format_bytes(size / planned.checkpoints), planned.checkpoints
    kept = "the newest" if count == 3 else f"the {count - 2} newest"
    return f"{count} checkpoints of {each}: {kept} (--keep {count - 2}), the best and one being written"


def _ways(planned: Planned) -> Iterator[str]:
    plan = planned.plan
    yield f"{'chosen' if planned.fits else 'nearest'}: trunk {plan.trunk}, {way_of(plan)}"
    for refusal in planned.refused:
        helps = f"; would fit with {refusal.change}" if refusal.change else ""
        yield f"refused: {refusal.way}: {refusal.reason}{helps}"
    if planned.breaks:
        broken = planned.breaks
        where = f"{broken.phase}, {broken.block}" if broken.block else broken.phase
        yield (
            f"breaks in {where}: {broken.operator.removeprefix('aten::')} of {format_bytes(broken.bytes)}, "
            f"shape {' x '.join(map(str, broken.shape))}"
        )
    for change in planned.changes:
        note = f" ({change.note})" if change.note else ""
        yield f"would fit: {change.options}{note}: {format_bytes(change.peak_bytes)}"


def _time(seconds: float) -> str:
    """A duration as "3 h 20 min", "4 min 10 s", "12 s" or "0.4 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "under 0.1 s"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
