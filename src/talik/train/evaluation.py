"""The loss over all trained tokens of a set, and how many of them are guessed right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from talik.data.labels import Example
from talik.recipe import Plan
from talik.train.cache import States
from talik.train.feed import load_micro_batches
from talik.train.step import MicroBatch, Top, run_top


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Over all trained tokens of a set: mean loss (natural logarithm) and share guessed right."""

    loss: float
    accuracy: float
    trained_tokens: int

    def measures(self) -> dict[str, float]:
        """Loss, perplexity and accuracy, for people and programs."""
        perplexity = math.exp(min(self.loss, 700.0))
        return {"loss": self.loss, "perplexity": perplexity, "accuracy": self.accuracy}


@torch.no_grad()
def evaluate_top(top: Top, examples: Sequence[Example], states: States, plan: Plan) -> Evaluation:
    """The mean loss over all trained tokens of the examples, and the share of them guessed right."""
    top.train_mode(False)
    loss, right, count = 0.0, 0, 0
    batches = load_micro_batches(examples, range(len(examples)), states, plan, top.chain)
    for batch in batches:
        batch_loss, batch_right = _evaluate_batch(top, batch, plan.loss_chunk)
        loss, right, count = loss + batch_loss, right + batch_right, count + len(batch.targets)
    return Evaluation(loss / count, right / count, count)


def _evaluate_batch(top: Top, batch: MicroBatch, chunk: int) -> tuple[float, int]:
    """The summed loss of a micro-batch and how many of its trained tokens were guessed right."""
    rows = run_top(top, batch).flatten(0, 1)[batch.rows]
    loss, right = 0.0, 0
    for part, targets in zip(rows.split(chunk), batch.targets.split(chunk), strict=True):
        logits = top.chain.tail(part[None])[0].float()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        right += int((logits.argmax(-1) == targets).sum().item())
    return loss, right
