"""Mistakes of labels, on one question and its answer: each token with its wrong and right label."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talik.data.examples import IGNORED, Example
from talik.data.labels import make_examples
from talik.data.messages import Conversation, Message
from talik.data.reading.rows import Place
from talik.diagnose.batch import batch_findings
from talik.diagnose.findings import Finding

QUESTION, ANSWER = "What is two plus three?", "Two plus three is five."
PADDING = 2  # padding tokens after the example


@dataclass(frozen=True, slots=True)
class Shown:
    """A batch of one row: each token with its wrong and its right label (None: masked).

    Attributes:
        shapes: Shape of input_ids, with the mistake and correct.
        findings: The findings of `talik.explain`.
    """

    tokens: tuple[tuple[str, str | None, str | None], ...]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """All values, for JSON."""
        return {
            "tokens": [{"token": t, "habit": wrong, "done_right": right} for t, wrong, right in self.tokens],
            "shapes": {"habit": self.shapes[0], "done_right": self.shapes[1]},
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(shown: Shown) -> Iterator[str]:
    yield f"input_ids {shown.shapes[0]}, done right {shown.shapes[1]}"
    yield f"{'token':<20}{'the habit trains':<20}{'done right':<20}"
    for row in shown.tokens:
        yield "".join(f"{'.' if text is None else repr(text):<20}" for text in row).rstrip()
    for finding in shown.findings:
        yield ""
        yield str(finding)


def _example(tokenizer: Any) -> dict[str, Tensor]:
    """The correct batch: one row, padded, labels at their tokens, the end of turn trained."""
    messages = (Message("user", QUESTION), Message("assistant", ANSWER))
    (made,), _ = make_examples([Conversation(messages, Place("the worked example", 1))], tokenizer)
    return _padded(made, _pad(tokenizer))


def _pad(tokenizer: Any) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def _padded(made: Example, pad: int) -> dict[str, Tensor]:
    ids, labels = made.input_ids + array("i", [pad] * PADDING), [*made.labels, *[IGNORED] * PADDING]
    mask = [1] * made.length + [0] * PADDING
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {key: torch.tensor([list(row)]) for key, row in rows.items()}


def _shown(wrong: dict[str, Tensor], right: dict[str, Tensor], tokenizer: Any) -> Shown:
    def texts(ids: Tensor) -> list[str | None]:
        return [None if token == IGNORED else tokenizer.decode([token]) for token in ids.flatten().tolist()]

    tokens = zip(texts(right["input_ids"]), texts(wrong["labels"]), texts(right["labels"]), strict=True)
    shapes = tuple(wrong["input_ids"].shape), tuple(right["input_ids"].shape)
    found = tuple(batch_findings(None, wrong, tokenizer))
    return Shown(tuple((str(token), own, good) for token, own, good in tokens), shapes, found)


def _extra_dimension(tokenizer: Any) -> Shown:
    right = _example(tokenizer)
    return _shown({key: value[:, None] for key, value in right.items()}, right, tokenizer)


def _two_sequences(tokenizer: Any) -> Shown:
    """Question and answer tokenized separately and padded to one length, as in translation."""
    right = _example(tokenizer)
    length = right["input_ids"].shape[1]
    wrong = {"input_ids": _alone(QUESTION, length, _pad(tokenizer), tokenizer)}
    wrong |= {"labels": _alone(ANSWER, length, IGNORED, tokenizer)}
    return _shown(wrong, right, tokenizer)


def _alone(text: str, length: int, pad: int, tokenizer: Any) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False).input_ids[:length]
    return torch.tensor([[*ids, *[pad] * (length - len(ids))]])


def _prompt_trained(tokenizer: Any) -> Shown:
    right = _example(tokenizer)
    labels = right["input_ids"].masked_fill(right["attention_mask"] == 0, IGNORED)
    return _shown({**right, "labels": labels}, right, tokenizer)


def _masked_end(tokenizer: Any) -> Shown:
    """Labels masked at every padding token; here the end of turn is the same token."""
    right = _example(tokenizer)
    ends = right["labels"] != IGNORED
    last = right["input_ids"][ends][-1]  # the padding token of a tokenizer with pad == eos
    ids = right["input_ids"].masked_fill(right["attention_mask"] == 0, int(last))
    labels = right["labels"].masked_fill(right["labels"] == last, IGNORED)
    right = {**right, "input_ids": ids}
    return _shown({**right, "labels": labels}, right, tokenizer)


LABELS: dict[str, Callable[[Any], Shown]] = {
    "extra-dimension": _extra_dimension,
    "two-sequences": _two_sequences,
    "prompt-trained": _prompt_trained,
    "masked-end": _masked_end,
}
