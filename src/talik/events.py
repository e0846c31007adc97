"""What is told to whoever watches a run. Nothing below `show` prints: it calls `notify(event)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Notify = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Said:
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


def silent(event: Any) -> None:
    """Tells nobody."""
