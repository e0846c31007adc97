"""Common mistakes of training loops, each simulated on a model and compared with the correct loop.

Mistakes that cost memory run on fake tensors, so weights are not needed. Mistakes of labels are shown on one
question and answer, with the model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from talik.base.errors import UsageError
from talik.base.files import format_bytes, parse_size
from talik.diagnose.habits_labels import LABELS, Shown
from talik.diagnose.loop import Batch, Loop, run_loop
from talik.model.chain.chain import Chain
from talik.model.folder import ModelFolder
from talik.simulate.account import levels
from talik.simulate.storage_log import StorageLog
from talik.training.step.loss import chunked_loss

PHASES = ("forward", "loss", "backward", "update")
BLOCKS = 16  # most rows of a table; deeper models show every second, third, ... block


@dataclass(frozen=True, slots=True)
class Habit:
    """A common mistake: what people see, why, and the right way; each a sentence or a line of code."""

    see: str
    why: str
    right: str


HABITS = {
    "trainable-embeddings": Habit(
        "Freezing the lower layers frees almost no memory.",
        "The embeddings still require a gradient, so the graph runs through every frozen layer.",
        "model.get_input_embeddings().requires_grad_(False)",
    ),
    "offloaded": Habit(
        "Memory fills up layer by layer in the forward, whatever the sequence length or dtype.",
        "Offloaded layers are copied in for their forward, and autograd keeps each copy, because the layer's "
        "input requires a gradient.",
        "model.get_input_embeddings().requires_grad_(False)",
    ),
    "checkpointing": Habit(
        "Everything below is frozen, and the backward still runs through all of it.",
        "gradient_checkpointing_enable() calls enable_input_require_grads(), which puts the frozen trunk "
        "back into the graph.",
        "model.disable_input_require_grads()  # after gradient_checkpointing_enable()",
    ),
    "offloaded-top": Habit(
        "The loss never moves, and there is no error.",
        "The trained layers are the offloaded ones; their gradients go to copies that are thrown away.",
        'device_map = {..., "model.layers.N": 0}  # the trained layers stay on the device',
    ),
    "full-logits": Habit(
        "Gigabytes appear in the loss.",
        "Logits of all positions, prompt and padding included, by the vocabulary, in fp32, several times.",
        "talik.chunked_loss(chain, hidden, labels)  # trained positions only, some at a time",
    ),
    "extra-dimension": Habit(
        "Batches have the shape (batch, 1, sequence).",
        "return_tensors='pt' inside __getitem__, then the default collate.",
        "return {key: value.squeeze(0) for key, value in tokens.items()}",
    ),
    "two-sequences": Habit(
        "The loss falls, and the model never learns to answer.",
        "Input and output are tokenised as two sequences, so labels differ from their input tokens.",
        "input_ids = prompt_ids + answer_ids; labels = [-100] * len(prompt_ids) + answer_ids",
    ),
    "prompt-trained": Habit(
        "The model learns to write questions, too.",
        "labels = input_ids.clone(), without a mask on the prompt.",
        "labels[:prompt_length] = -100",
    ),
    "masked-end": Habit(
        "The model never stops.",
        "The end-of-turn is masked together with the padding, because pad == eos.",
        "labels[attention_mask == 0] = -100  # not labels == tokenizer.pad_token_id",
    ),
}


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two loops.

    Attributes:
        learning: Numbers in trained parameters that got a gradient, of `trained` ones.
        full_at: The block in which the budget is exceeded.
        backward_flops: FLOPs of products in the backward.
        logits: Bytes of logits and loss at their peak.
    """

    levels: dict[str, int]
    phases: dict[str, int]
    peak: int
    trained: int
    learning: int
    backward_flops: int
    logits: int
    full_at: str | None


@dataclass(frozen=True, slots=True)
class HabitReport:
    """A mistake and the correct loop: two loops (memory), or one example (labels)."""

    name: str
    habit: Habit
    assumed: str
    sides: tuple[Side, Side] | None
    shown: Shown | None

    def as_dict(self) -> dict[str, Any]:
        """All values, for JSON."""
        wrong, right = self.sides or (None, None)
        return {
            "name": self.name,
            **asdict(self.habit),
            "assumed": self.assumed,
            "habit": asdict(wrong) if wrong else None,
            "done_right": asdict(right) if right else None,
            "example": self.shown.as_dict() if self.shown else None,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def habit(
    name: str,
    model: ModelFolder,
    budget: int | str | None = None,
    *,
    top_layers: int = 5,
    batch_size: int = 1,
    sequence: int = 1024,
) -> HabitReport:
    """Simulates a mistake of HABITS on a model, and the correct loop.

    Memory: bf16, AdamW, the last `top_layers` layers trained, `batch_size` rows of `sequence` tokens, half of
    them trained; only config.json is read. Labels: the tokenizer is needed.

    Args:
        name: A key of HABITS.
        model: The model.
        budget: The device's memory in bytes, or as "24GiB".
        top_layers: The number of trained layers.
        batch_size: Rows of the batch.
        sequence: Tokens of a row.

    Raises:
        SourceError: The model cannot be built.
        UsageError: The name is unknown, the tokenizer is missing, or nothing would be frozen.
    """
    if name not in HABITS:
        raise UsageError(f"{name!r} is not a known habit", remedy=f"Choose one of: {', '.join(HABITS)}.")
    if name in LABELS:
        shown = LABELS[name](_tokenizer(model))
        return HabitReport(name, HABITS[name], "one question and its answer", None, shown)
    room = parse_size(budget) if budget is not None else None
    wrong, right = (
        _side(name, done_right, model, (top_layers, batch_size, sequence), room)
        for done_right in (False, True)
    )
    assumed = (
        f"bf16, AdamW for the trained parameters, the top {top_layers} layers trained, a batch of "
        f"{batch_size} x {sequence:,} tokens, half of them trained; two steps, tensors alone"
    )
    return HabitReport(name, HABITS[name], assumed, (wrong, right), None)


def _tokenizer(model: ModelFolder) -> Any:
    if not (model.path / "tokenizer.json").is_file():  # Transformers would create an empty tokenizer
        remedy = "Name the model's whole folder: habits of labels are shown with its tokenizer."
        raise UsageError("there is no tokenizer.json", where=model.path, remedy=remedy)
    return model.tokenizer()


def _side(
    name: str, done_right: bool, folder: ModelFolder, sizes: tuple[int, int, int], room: int | None
) -> Side:
    """Prepares a hollow model with the mistake or without it, and runs the loop on fake tensors."""
    top_layers, batch_size, sequence = sizes
    model = folder.hollow(torch.bfloat16).train()
    chain = Chain(model, "cpu")
    if not 1 <= top_layers < len(chain.layers):
        problem = f"of {len(chain.layers)} layers some must be trained and some frozen, and not {top_layers}"
        remedy = f"Choose --top-layers between 1 and {len(chain.layers) - 1}."
        raise UsageError(problem, where=folder.path, remedy=remedy)
    cut = len(chain.layers) - top_layers
    offloaded = _prepare(name, done_right, chain, cut)
    loss = _ChunkedLoss(chain) if name == "full-logits" and done_right else None
    loop = run_loop(model, _batch(batch_size, sequence), offloaded, loss)
    return _side_of(loop, room)


def _prepare(name: str, done_right: bool, chain: Chain, cut: int) -> list[nn.Module]:
    """Freezes the layers below `cut` and, by the mistake, other parts; returns the offloaded modules."""
    below, top = chain.layers[:cut], chain.layers[cut:]
    for layer in below:
        layer.requires_grad_(False)
    if done_right or name not in ("trainable-embeddings", "offloaded"):
        chain.embedding.requires_grad_(False)
    if name == "full-logits":  # the gradient of a trained head would hide the memory of the logits
        for name in chain.parts.names("head"):
            chain.model.get_submodule(name).requires_grad_(False)
    if name == "checkpointing":
        chain.model.config.use_cache = False  # checkpointing would set it with a warning
        chain.model.activation_checkpointing_enable()
        if done_right:
            chain.model.disable_input_require_grads()
    if name == "offloaded" or (name == "offloaded-top" and done_right):
        return _owners(below)
    return _owners(top) if name == "offloaded-top" else []


def _owners(layers: list[nn.Module]) -> list[nn.Module]:
    return [module for layer in layers for module in layer.modules() if module._parameters]


def _batch(batch_size: int, sequence: int) -> dict[str, Tensor]:
    ids = torch.arange(batch_size * sequence).reshape(batch_size, sequence) % 97 + 3
    labels = ids.clone()
    labels[:, : sequence // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class _ChunkedLoss:
    """Talik's own loss, from the output of the last layer."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        handed: list[Any] = []
        last = self._chain.layers[-1].register_forward_hook(lambda *given: handed.append(given[-1]))
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        try:
            model.base_model(**inputs)  # pyright: ignore[reportCallIssue]
        finally:
            last.remove()
        hidden = handed[0] if isinstance(handed[0], Tensor) else handed[0][0]
        return chunked_loss(self._chain, hidden, batch["labels"])


def _side_of(loop: Loop, room: int | None) -> Side:
    simulation = loop.simulation
    return Side(
        levels={block.name: block.alive for block in loop.blocks},
        phases={peak.phase: peak.bytes for peak in simulation.phases if peak.phase in PHASES},
        peak=simulation.peak.bytes,
        trained=loop.trained,
        learning=loop.learning,
        backward_flops=simulation.flops.get("backward", 0),
        logits=sum(p.causes.get("logits and loss", 0) for p in simulation.phases if p.phase == "loss"),
        full_at=_full_at(simulation.log, room) if room is not None else None,
    )


def _full_at(log: StorageLog, room: int) -> str | None:
    for number, phase, total in levels(log):
        if total > room:
            step = sum(begun == "forward" and at <= number for at, begun in log.marks)
            return f"{phase} {log.storage(number).block}".strip() + f", step {step}"
    return None


def _lines(report: HabitReport) -> Iterator[str]:
    yield f"{report.name}: {report.habit.see}"
    yield f"why      {report.habit.why}"
    yield f"change   {report.habit.right}"
    yield f"assumed  {report.assumed}"
    yield ""
    if report.shown:
        yield str(report.shown)
    if report.sides:
        yield from _table(*report.sides)


def _table(wrong: Side, right: Side) -> Iterator[str]:
    def row(name: str, value: Callable[[Side], str]) -> str:
        return f"{name:<22}{value(wrong):>26}{value(right):>26}"

    yield f"{'after the forward of':<22}{'the habit':>26}{'done right':>26}"
    blocks = list(wrong.levels)
    every = -(-len(blocks) // BLOCKS)
    for block in dict.fromkeys([*blocks[::every], blocks[-1]]):
        yield row(block, lambda side, block=block: format_bytes(side.levels[block]))
    yield "peak of"
    for phase in wrong.phases:
        yield row(phase, lambda side, phase=phase: format_bytes(side.phases.get(phase, 0)))
    yield row("logits and loss", lambda side: format_bytes(side.logits))
    yield row("backward, GFLOP", lambda side: f"{side.backward_flops / 1e9:,.1f}")
    yield row("numbers trained", lambda side: f"{side.trained:,}")
    yield row("of which learning", lambda side: f"{side.learning:,}")
    if wrong.full_at or right.full_at:
        yield row("budget full at", lambda side: side.full_at or "fits")
