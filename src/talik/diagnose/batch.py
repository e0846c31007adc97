"""Finds wrong shapes and labels of a batch; with a tokenizer also trained prompts and untrained ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from talik.data.examples import IGNORED
from talik.diagnose.findings import Finding
from talik.diagnose.loop import Batch
from talik.diagnose.turns import turn_findings

KEYS = ("input_ids", "attention_mask", "labels")


def batch_findings(model: nn.Module | None, batch: Batch, tokenizer: Any = None) -> list[Finding]:
    """The mistakes in a batch; `model` gives the vocabulary size."""
    found = list(_shapes(batch))
    batch = squeezed(batch)
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if isinstance(ids, Tensor) and model is not None:
        found += _outside(ids, labels, model)
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return found
    found += _untrained(labels)
    if isinstance(ids, Tensor) and ids.dim() == 2:
        misplaced = list(_misplaced(ids, labels))
        found += misplaced
        if not misplaced:
            found += _padding(labels, batch.get("attention_mask"))
            found += turn_findings(ids, labels, batch.get("attention_mask"), tokenizer)
    return found


def squeezed(batch: Batch) -> dict[str, Any]:
    """The intended batch: (batch, sequence) for (batch, 1, sequence)."""
    return {key: value.squeeze(1) if _has_extra(key, value) else value for key, value in batch.items()}


def _has_extra(key: str, value: Any) -> bool:
    return key in KEYS and isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == 1


def _shapes(batch: Batch) -> Iterator[Finding]:
    extra = [key for key, value in batch.items() if _has_extra(key, value)]
    if extra:
        shape = tuple(batch[extra[0]].shape)
        what = (
            f"{', '.join(extra)} have the shape {shape}: the tokenizer was called with return_tensors='pt' "
            "for one row, which gave (1, sequence), and the collate stacked these. The model expects "
            "(batch, sequence)."
        )
        line = "return {key: value.squeeze(0) for key, value in tokens.items()}  # in __getitem__"
        yield Finding("extra-dimension", what, extra[0], batch[extra[0]].dim(), "dimensions", line)
    elif isinstance(ids := batch.get("input_ids"), Tensor) and ids.dim() != 2:
        what = f"input_ids have the shape {tuple(ids.shape)}; the model expects (batch, sequence)."
        line = "input_ids = input_ids.reshape(batch_size, -1)"
        yield Finding("extra-dimension", what, "input_ids", ids.dim(), "dimensions", line)


def _outside(ids: Tensor, labels: Any, model: nn.Module) -> Iterator[Finding]:
    """Ids outside the vocabulary."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    wrong: dict[str, Tensor] = {"input_ids": (ids < 0) | (ids >= rows)}
    if isinstance(labels, Tensor):
        wrong["labels"] = ((labels < 0) & (labels != IGNORED)) | (labels >= rows)
    for key, places in wrong.items():
        if count := int(places.sum()):
            what = f"{key} contain {count:,} ids outside the vocabulary: the model has {rows:,} tokens."
            line = (
                f"{key}[{key} < 0] = {IGNORED}  # positions that the loss ignores" if key == "labels" else ""
            )
            fix = line or "model.resize_token_embeddings(len(tokenizer))"
            yield Finding("outside-vocabulary", what, key, count, "tokens", fix)


def _untrained(labels: Tensor) -> Iterator[Finding]:
    """Rows without a trained token; the first label never counts."""
    empty = int((labels[:, 1:] == IGNORED).all(1).sum())
    if empty:
        what = f"In {empty:,} of {len(labels):,} rows every label is {IGNORED}: no token of them is trained."
        line = "labels[prompt_length:] = input_ids[prompt_length:]  # and drop rows cut before the answer"
        yield Finding("nothing-trained", what, "labels", empty, "rows", line)


def _misplaced(ids: Tensor, labels: Tensor) -> Iterator[Finding]:
    """Labels that differ from the tokens at their positions."""
    if ids.shape != labels.shape:
        what = (
            f"labels have the shape {tuple(labels.shape)} and input_ids {tuple(ids.shape)}: input and output "
            "were tokenised as two sequences. A causal model reads one sequence and learns its answer part."
        )
        yield Finding("two-sequences", what, "labels", labels.shape[-1], "tokens", ONE_SEQUENCE)
        return
    trained = labels != IGNORED
    wrong = int((trained & (labels != ids)).sum())
    shifted = trained[:, :-1] & (labels[:, :-1] != ids[:, 1:])
    if not wrong:
        return
    if int(trained[:, :-1].sum()) and not int(shifted.sum()):
        what = (
            f"labels are already shifted by one position ({wrong:,} tokens), and the model shifts them again."
        )
        line = "labels = input_ids.clone()  # the model shifts"
        yield Finding("shifted-labels", what, "labels", wrong, "tokens", line)
    else:
        what = (
            f"{wrong:,} of {int(trained.sum()):,} trained labels differ from the token at their position: "
            "input and output were tokenised as two sequences of the same length."
        )
        yield Finding("two-sequences", what, "labels", wrong, "tokens", ONE_SEQUENCE)


ONE_SEQUENCE = """\
input_ids = prompt_ids + answer_ids  # answer_ids with the end-of-turn
labels = [-100] * len(prompt_ids) + answer_ids"""


def _padding(labels: Tensor, mask: Any) -> Iterator[Finding]:
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return
    count = int(((mask == 0) & (labels != IGNORED)).sum())
    if count:
        what = f"{count:,} padding tokens are trained: the model learns to write padding."
        line = f"labels[attention_mask == 0] = {IGNORED}"
        yield Finding("padding-trained", what, "labels", count, "tokens", line)
