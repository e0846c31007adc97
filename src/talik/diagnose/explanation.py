"""Explains a training loop: mistakes in a model and a batch, and the peak memory.

print(talik.explain(model, batch, tokenizer))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from talik.base.errors import SourceError, UsageError
from talik.base.files import format_bytes, parse_size
from talik.diagnose.batch import batch_findings, squeezed
from talik.diagnose.findings import Finding
from talik.diagnose.graph import (
    causes,
    first_trained,
    graph_findings,
    logits_findings,
    offload_findings,
    offloaded_modules,
)
from talik.diagnose.loop import BlockMemory, Loop, run_loop
from talik.model.anatomy import parts_of
from talik.simulate.account import Break, Peak

ASSUMED = (
    "loss = model(**batch).loss, loss.backward(), one AdamW for the trained parameters; two steps, one "
    "device, in the model's present mode"
)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The findings, and the peak memory.

    Attributes:
        blocks: Embeddings and layers in the first forward.
        why: The reason why the first block in the graph is part of it.
        peak: Bytes of tensors; None if the loop cannot be simulated.
        assumed: The simulated loop, or why it was not simulated.
    """

    findings: tuple[Finding, ...]
    peak: Peak | None
    blocks: tuple[BlockMemory, ...]
    why: str | None
    assumed: str

    def as_dict(self) -> dict[str, Any]:
        """All values, for JSON."""
        return {
            "findings": [finding.as_dict() for finding in self.findings],
            "peak": asdict(self.peak) if self.peak else None,
            "blocks": [asdict(block) for block in self.blocks],
            "why": self.why,
            "assumed": self.assumed,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(
    model: nn.Module, batch: Mapping[str, Any], tokenizer: Any = None, budget: int | str | None = None
) -> Explanation:
    """Finds mistakes in a training loop, from its model and one batch.

    The model is not changed, and no memory is allocated for it.

    Args:
        model: A causal LM of Transformers, with the hooks and flags it is trained with.
        batch: The arguments of `model(**batch)`, labels included.
        tokenizer: Also find trained prompts and untrained ends of turns.
        budget: The device's memory in bytes, or as "24GiB".

    Raises:
        SourceError: The model has no layers that Talik recognises.
        UsageError: The batch has no tensors.
    """
    if not any(isinstance(batch.get(key), Tensor) for key in ("input_ids", "inputs_embeds")):
        remedy = "Pass the arguments of model(**batch): tensors of shape (batch, sequence)."
        raise UsageError("the batch has no tensor input_ids", remedy=remedy)
    if not hasattr(model, "config"):
        raise SourceError(f"{type(model).__name__} is not a Transformers model")
    parts_of(model)
    loop, assumed = _simulated(model, squeezed(batch))
    found = [*batch_findings(model, batch, tokenizer), *offload_findings(model, loop)]
    if loop is None:
        return Explanation(tuple(found), None, (), None, assumed)
    found += [*graph_findings(model, loop), *logits_findings(model, squeezed(batch), loop)]
    broken = loop.simulation.first_break(parse_size(budget)) if budget is not None else None
    if broken is not None:
        found.append(_too_much(broken, loop, parse_size(budget or 0)))
    return Explanation(tuple(found), loop.simulation.peak, loop.blocks, _why(model, loop), assumed)


def _simulated(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Loop | None, str]:
    try:
        return run_loop(model, batch, offloaded_modules(model)), ASSUMED
    except Exception as error:  # the model may raise any error, and the other findings are still valid
        return None, f"the peak is not known: {type(error).__name__}: {error}"


def _why(model: nn.Module, loop: Loop) -> str | None:
    """The reason why the first block in the graph is part of it."""
    parts, blocks = parts_of(model), [block for block in loop.blocks if block.in_graph]
    if not blocks:
        return None
    first = next((block.name for block in blocks if block.name.startswith("layer ")), "layer 0")
    if first == f"layer {first_trained(model, parts)}" and blocks[0].name == first:
        return f"{first}: its own parameters are trained"
    return f"{first}: " + "; ".join(cause.why for cause in causes(model, parts, first))


def _too_much(broken: Break, loop: Loop, budget: int) -> Finding:
    peak = loop.simulation.peak
    where = f"{broken.phase} {broken.block}".strip()
    what = (
        f"{where}: {broken.operator.removeprefix('aten::')} of "
        f"{format_bytes(broken.bytes)} makes it {format_bytes(broken.total)}, more than "
        f"{format_bytes(budget)}; the peak would be {format_bytes(peak.bytes)} ({peak.phase})."
    )
    line = "talik plan MODEL DATA  # the ways that fit"
    return Finding("does-not-fit", what, where, peak.bytes, "bytes", line)


def _lines(explained: Explanation) -> Iterator[str]:
    count = len(explained.findings)
    nothing = (
        "nothing found" if explained.peak else "nothing found in the batch; memory and graph are not known"
    )
    yield f"{count} finding{'s' if count > 1 else ''}" if count else nothing
    for finding in explained.findings:
        yield ""
        yield str(finding)
    yield ""
    if explained.why:
        yield f"graph    from {explained.why}"
    if peak := explained.peak:
        yield f"peak     {format_bytes(peak.bytes)} ({peak.phase}{f', {peak.block}' if peak.block else ''})"
        for cause, size in sorted(peak.causes.items(), key=lambda item: -item[1]):
            yield f"  {cause:<18}{format_bytes(size):>10}"
    yield f"assumed  {explained.assumed}"
