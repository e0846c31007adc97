"""Draws the questions that are held out for evaluation and the rows that a weight selects.

The draws depend on the seed alone.

This module needs no torch, so that worker processes stay small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from talik.base.files import fingerprint
from talik.data.messages import Conversation, Document

Made = TypeVar("Made", bound=Conversation | Document)
DRAW_STEP = 2.0**-52  # the smallest difference between two draws


def split_held_out(conversations: Sequence[Made], wanted: float, seed: int) -> tuple[list[Made], list[Made]]:
    """Splits conversations into those to train on and those held out for evaluation.

    A question is all text before the last answer, ignoring case and outer blanks; all its answers are on the
    same side. The side depends on the question and the seed alone, so new rows do not move others. If one
    side would be empty, it gets one question; a single question is trained on.

    Args:
        conversations: The conversations.
        wanted: The share of the questions to hold out, below 1, or their number.
        seed: The seed of the draws.

    Returns:
        The conversations to train on, and those held out.
    """
    draws = [question_draw(conversation, seed) for conversation in conversations]
    limit = draws_limit(draws, wanted)
    trained = [c for c, draw in zip(conversations, draws, strict=True) if draw >= limit]
    return trained, [c for c, draw in zip(conversations, draws, strict=True) if draw < limit]


def draws_limit(draws: Any, wanted: float) -> float:
    """Returns the limit between the two sides: questions with a draw below it are held out.

    Neither side is left empty if there are at least two questions.

    Args:
        draws: The draw of every example (`question_draw`), as a list or an array.
        wanted: The share of the questions to hold out, below 1, or their number.
    """
    if not wanted or not len(draws):
        return 0.0
    if wanted >= 1:
        questions = np.unique(draws)
        return float(questions[min(int(wanted), len(questions) - 1)])
    return min(max(wanted, float(np.min(draws)) + DRAW_STEP), float(np.max(draws)))


def question_draw(conversation: Conversation | Document, seed: int) -> float:
    """Returns a number in [0, 1) that depends on the question and the seed alone."""
    if isinstance(conversation, Document):
        question = [conversation.text.strip()]
    else:
        question = [message.content.strip().casefold() for message in conversation.messages[:-1]]
    return _draw(str(seed), *question)


def row_draw(seed: int, file: int, row: int) -> float:
    """Returns a number in [0, 1) that depends on the seed and the numbers of the file and the row alone."""
    return _draw(str(seed), "row", str(file), str(row))


def _draw(*parts: str) -> float:
    return int(fingerprint(*parts)[:13], 16) * DRAW_STEP
