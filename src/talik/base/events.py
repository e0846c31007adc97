"""What is told to whoever watches a run. Nothing below `show` prints: it calls `notify(event)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Notify = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Status:
    """One line about what is going on; `topic` is one word in front of it."""

    topic: str
    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far something has come, in tokens; `text` says it where it is not counted in tokens.

    A `total` of 0: it is not known.
    """

    what: str
    done: int
    total: int
    text: str = ""


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


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step, as it stands in metrics.jsonl, and how many there will be."""

    step: int
    epoch: int
    loss: float
    trained_tokens: int
    tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float
    peak_memory_bytes: int
    steps: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    step: int
    evaluation: Evaluation
    best: bool
    by_source: dict[str, Evaluation]


@dataclass(frozen=True, slots=True)
class Saved:
    step: int
    path: Path


def silent(event: Any) -> None:
    """Tells nobody."""
