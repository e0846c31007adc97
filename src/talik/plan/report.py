"""A plan on one screen."""

from __future__ import annotations

from collections.abc import Iterator

from talik.files import in_words
from talik.plan.ways import Planned

WIDTH = 40  # characters of a bar that stands for the whole budget


def plan_text(planned: Planned) -> str:
    """Whether it fits, a bar for every phase, what the peak is made of, the way chosen, those refused."""
    return "\n".join(_lines(planned))


def _lines(planned: Planned) -> Iterator[str]:
    peak, plan = planned.peak, planned.plan
    verdict = "fits" if planned.fits else "does not fit"
    yield (
        f"{verdict}: {in_words(peak.bytes)} of {in_words(planned.budget)}, of which "
        f"{in_words(planned.slack)} are kept back ({plan.device})"
    )
    if planned.assumed:
        yield f"assumed: {planned.assumed}"
    yield ""
    for phase in planned.phases:
        filled = min(WIDTH, round(WIDTH * phase.bytes / planned.budget))
        block = f"  {phase.block}" if phase.block else ""
        yield f"{phase.phase:<9}{'#' * filled:.<{WIDTH}} {in_words(phase.bytes):>9}{block}"
    yield ""
    yield f"at the peak ({peak.phase}{f', {peak.block}' if peak.block else ''}):"
    for cause, size in sorted(peak.causes.items(), key=lambda item: -item[1]):
        if size >= 1 << 20:
            yield f"  {cause:<18}{in_words(size):>10}"
    recomputed = "recomputed" if plan.recompute else "kept"
    yield ""
    yield (
        f"{'chosen' if planned.fits else 'nearest'}: trunk {plan.trunk}, micro-batches of "
        f"{plan.micro_batch_tokens:,} tokens, activations {recomputed}, loss chunks of {plan.loss_chunk}"
    )
    for refusal in planned.refused:
        way = refusal.way
        recomputed = ", recomputed" if way["recompute"] else ""
        yield f"refused: micro-batches of {way['micro_batch_tokens']:,}{recomputed}: {refusal.reason}"
    if planned.breaks:
        broken = planned.breaks
        yield (
            f"breaks in {broken.phase} {broken.block}: {broken.operator} of {in_words(broken.bytes)}, "
            f"shape {' x '.join(map(str, broken.shape))}"
        )
