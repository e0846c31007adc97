"""Finds frozen blocks in the graph and the reason, offloaded weights, and the memory of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from talik.base.files import format_bytes
from talik.diagnose.findings import Finding
from talik.diagnose.loop import Batch, BlockMemory, Loop
from talik.model.anatomy import Parts, parts_of
from talik.simulate.account import levels

CHUNK = 256  # trained positions per chunk of Talik's own loss
LARGE = 64 << 20  # bytes of needless logits that are not reported
CHECKPOINTING = "make_inputs_require_grads"  # the hook of enable_input_require_grads() in Transformers

KEPT = """\
keep = (labels[:, 1:] != -100).any(0).nonzero().squeeze(1)
logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep).logits.float()
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, keep + 1].flatten())"""
CHUNKED = """\
loss = talik.chunked_loss(talik.Chain(model), hidden, labels)  # hidden: the output of the last layer"""


@dataclass(frozen=True, slots=True)
class Cause:
    """A parameter or hook that makes frozen layers part of the graph, and the line that removes it."""

    habit: str
    name: str
    why: str
    line: str


def first_trained(model: nn.Module, parts: Parts) -> int:
    """The first layer with a trained parameter; the number of layers if only the tail has one."""
    trained = (parts.part(name) for name, weight in model.named_parameters() if weight.requires_grad)
    layers = [int(part.split()[1]) for part in trained if part.startswith("layer ")]
    return min(layers, default=parts.count)


def offloaded_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights accelerate copies in for their forward."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        for hook in _hooks_of_accelerate(module):
            if getattr(hook, "offload", False):
                owners = module.modules() if getattr(hook, "place_submodules", False) else [module]
                found |= {id(owner): owner for owner in owners if _is_away(owner)}
    return list(found.values())


def _hooks_of_accelerate(module: nn.Module) -> tuple[Any, ...]:
    hook = vars(module).get("_hf_hook")
    return tuple(getattr(hook, "hooks", (hook,))) if hook is not None else ()


def _is_away(module: nn.Module) -> bool:
    return any(weight is not None and weight.is_meta for weight in module._parameters.values())


def graph_findings(model: nn.Module, loop: Loop) -> Iterator[Finding]:
    """Frozen layers below the first trained one that are part of the graph, once per reason."""
    parts = parts_of(model)
    cut = first_trained(model, parts)
    trunk = [block for block in _layers(loop)[:cut] if block.in_graph]
    if not trunk or not _trains_above(model, parts):
        return
    kept = sum(block.kept + block.copies for block in trunk)
    names = f"{trunk[0].name} to {trunk[-1].name}" if len(trunk) > 1 else trunk[0].name
    for cause in causes(model, parts, trunk[0].name):
        what = (
            f"{names}: nothing in them is trained, but they are in the graph, because {cause.why}. "
            f"They keep {format_bytes(kept)} for the backward, which runs through all of them."
        )
        yield Finding(cause.habit, what, cause.name, kept, "bytes", cause.line)


def _layers(loop: Loop) -> list[BlockMemory]:
    return [block for block in loop.blocks if block.name.startswith("layer ")]


def _trains_above(model: nn.Module, parts: Parts) -> bool:
    """True if something other than the embeddings is trained; otherwise the graph must reach them."""
    trained = (parts.part(name) for name, weight in model.named_parameters() if weight.requires_grad)
    return any(part != "embeddings" for part in trained)


def causes(model: nn.Module, parts: Parts, block: str) -> list[Cause]:
    """Parameters and hooks that can make `block` and later ones part of the graph."""
    before = list(parts.names("embeddings"))
    before += [f"{parts.layers}.{index}" for index in range(int(block.split()[1]) + 1)]
    found: list[Cause] = []
    others: list[Cause] = []
    for name in before:
        module = model.get_submodule(name)
        found += [_of_parameter(f"{name}.{own}", name, parts) for own, w in _trained_in(module)]
        for cause in _of_hooks(name, module):
            (found if cause.habit == "checkpointing" else others).append(cause)
    unknown = f"the input of {block} requires a gradient"
    return found or others or [Cause("in-the-graph", block, unknown, "hidden = hidden.detach()")]


def _trained_in(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def _of_hooks(name: str, module: nn.Module) -> Iterator[Cause]:
    for own, inner in module.named_modules(prefix=name):
        for hook in inner._forward_hooks.values():
            yield _of_hook(own, hook)


def _of_parameter(name: str, module: str, parts: Parts) -> Cause:
    tied = ", which is the head's matrix too (tied)," if parts.tied and module == parts.embedding else ""
    return Cause(
        "trainable-embeddings",
        name,
        f"{name}{tied} still requires a gradient",
        f"model.{module}.requires_grad_(False)",
    )


def _of_hook(module: str, hook: Any) -> Cause:
    name = getattr(hook, "__qualname__", type(hook).__qualname__)
    if CHECKPOINTING in name:
        why = f"gradient_checkpointing_enable() put the hook {CHECKPOINTING} on {module}"
        line = "model.disable_input_require_grads()  # after gradient_checkpointing_enable()"
        return Cause("checkpointing", f"a forward hook of {module}", why, line)
    why = f"the forward hook {name} of {module} may make its result require one"
    return Cause("in-the-graph", f"a forward hook of {module}", why, f"handle.remove()  # of {name}")


def offload_findings(model: nn.Module, loop: Loop | None) -> Iterator[Finding]:
    """Trained parameters that are offloaded, and frozen weights whose copies autograd keeps."""
    parts = parts_of(model)
    away = {name: w for name, w in model.named_parameters() if w.requires_grad and w.is_meta}
    if away:
        blocks = list(dict.fromkeys(parts.part(name) for name in away))
        size = sum(weight.nbytes for weight in away.values())
        what = (
            f"{len(away):,} trained parameters are offloaded or on meta ({_some(blocks)}): their gradients "
            "go to copies that are thrown away, so they never change, and nothing says so."
        )
        line = f"device_map = {{..., {_entries(parts, blocks)}}}  # the trained blocks stay on the device"
        yield Finding("offloaded-top", what, next(iter(away)), size, "bytes", line)
    copied = [block for block in _layers(loop) if block.copies] if loop else []
    if copied:
        yield _copied(copied, model, parts)


def _copied(copied: list[BlockMemory], model: nn.Module, parts: Parts) -> Finding:
    total = sum(block.copies for block in copied)
    below = int(copied[0].name.split()[1]) < first_trained(model, parts)
    reasons = causes(model, parts, "layer 0") if below else []
    line = "\n".join(cause.line for cause in reasons if cause.habit != "in-the-graph")
    what = (
        f"Frozen weights of {len(copied)} offloaded layers are copied in for their forward, and autograd "
        f"keeps each copy until the backward, because the layer's input requires a gradient: "
        f"{format_bytes(total // len(copied))} x {len(copied)} layers, whatever the batch."
    )
    keep = f"device_map = {{..., {_entries(parts, [block.name for block in copied])}}}"
    where = f"{copied[0].name} to {copied[-1].name}"
    return Finding("offloaded", what, where, total, "bytes", line or keep)


def _entries(parts: Parts, blocks: list[str]) -> str:
    """At most three entries of a device map for some blocks."""
    names: list[str] = []
    for block in blocks:
        layer = block.startswith("layer ")
        names += [f"{parts.layers}.{block.split()[1]}"] if layer else parts.names(block)
    shown = ", ".join(f'"{name}": 0' for name in names[:3])
    return f"{shown}, ..." if len(names) > 3 else shown


def _some(blocks: list[str]) -> str:
    return ", ".join(blocks[:3]) + (f" and {len(blocks) - 3} more" if len(blocks) > 3 else "")


def logits_findings(model: nn.Module, batch: Batch, loop: Loop) -> Iterator[Finding]:
    """Logits that are the larger part of the peak and mostly of untrained positions."""
    log = loop.simulation.log
    number = max(levels(log), key=lambda level: level[2])[0]
    vocabulary, labels = _vocabulary(model), batch.get("labels")
    made = [s for s in log.alive(number) if s.shape[-1:] == (vocabulary,) and len(s.shape) > 1]
    made = [s for s in made if s.cause in (None, "logits and loss")]
    size, positions = sum(s.bytes for s in made), max((_rows(s.shape) for s in made), default=0)
    if not positions or not isinstance(labels, Tensor):
        return
    trained = int((labels.flatten(0, -2)[:, 1:] != -100).sum()) if labels.dim() > 1 else 0
    needless = size - size * min(trained, CHUNK, positions) // positions
    if 2 * size < loop.simulation.peak.bytes or needless < LARGE:
        return
    what = (
        f"Logits of {positions:,} positions x {vocabulary:,}, {len(made)} copies of them at the peak, are "
        f"the larger part of it. The loss counts {trained:,} positions, and can be taken {CHUNK} at a time."
    )
    line = KEPT if 2 * trained < positions else CHUNKED
    yield Finding("full-logits", what, "model(**batch).loss", size, "bytes", line)


def _vocabulary(model: nn.Module) -> int:
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return head.weight.shape[0] if head is not None else 0


def _rows(shape: tuple[int, ...]) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows
