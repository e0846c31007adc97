"""Events: what `notify` is called with while a run goes on. Only talik.cli.show prints them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Notify = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Status:
    """One line about what is going on.

    Attributes:
        topic: One word that is shown in front.
        text: The line.
    """

    topic: str
    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of one activity.

    Attributes:
        what: The activity, in one word.
        done: Tokens done so far.
        total: Tokens in all; 0 if that is not known.
        text: Shown in place of the token counts if it is not empty.
    """

    what: str
    done: int
    total: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss and accuracy over all trained tokens of a data set.

    Attributes:
        loss: Mean cross-entropy per trained token, natural logarithm.
        accuracy: Share of the trained tokens that the model predicts.
        trained_tokens: Their number.
    """

    loss: float
    accuracy: float
    trained_tokens: int

    def measures(self) -> dict[str, float]:
        """Loss, perplexity and accuracy by their names."""
        perplexity = math.exp(min(self.loss, 700.0))
        return {"loss": self.loss, "perplexity": perplexity, "accuracy": self.accuracy}


@dataclass(frozen=True, slots=True)
class StepDone:
    """One training step as metrics.jsonl records it, and the number of steps of the run (`steps`)."""

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
    """An evaluation during a run.

    Attributes:
        step: The step after which it was made; 0 for the base model.
        evaluation: The result over all evaluation data.
        best: True if no earlier evaluation has a lower loss.
        by_source: The result for each source of the data, if there are several.
    """

    step: int
    evaluation: Evaluation
    best: bool
    by_source: dict[str, Evaluation]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


def silent(event: Any) -> None:
    """Ignores an event: the default of `notify`."""
