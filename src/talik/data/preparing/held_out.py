"""Which questions are held out for evaluation, and which rows a weight chooses: draws from the seed alone.

Needs no torch, so that worker processes are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from talik.base.files import fingerprint
from talik.data.messages import Conversation, Document

Made = TypeVar("Made", bound=Conversation | Document)
DRAWS = 2.0**-52  # the least distance of two draws that differ


def split_held_out(conversations: Sequence[Made], wanted: float, seed: int) -> tuple[list[Made], list[Made]]:
    """The conversations to train on and those held out, about a share `wanted` of the questions or that many.

    A question is all text before the last answer, without case and outer blanks; all its answers are on one
    side. The side depends on the question and `seed` alone, so new rows move no other. Where that would leave
    a side empty, one question goes there; a single question is trained on.
    """
    draws = [question_draw(conversation, seed) for conversation in conversations]
    limit = draws_limit(draws, wanted)
    trained = [c for c, draw in zip(conversations, draws, strict=True) if draw >= limit]
    return trained, [c for c, draw in zip(conversations, draws, strict=True) if draw < limit]


def draws_limit(draws: Any, wanted: float) -> float:
    """The draw from which on questions are trained on; those below it are held out.

    Args:
        draws: The draw of every example (`question_draw`), as a list or an array.
        wanted: A share below 1, or a number of questions. Neither side is left empty where there are two
            questions.
    """
    if not wanted or not len(draws):
        return 0.0
    if wanted >= 1:
        questions = np.unique(draws)
        return float(questions[min(int(wanted), len(questions) - 1)])
    return min(max(wanted, float(np.min(draws)) + DRAWS), float(np.max(draws)))


def question_draw(conversation: Conversation | Document, seed: int) -> float:
    """A number in [0, 1) that is the same for the same question and seed."""
    if isinstance(conversation, Document):
        question = [conversation.text.strip()]
    else:
        question = [message.content.strip().casefold() for message in conversation.messages[:-1]]
    return _draw(str(seed), *question)


def row_draw(seed: int, file: int, row: int) -> float:
    """A number in [0, 1) that is the same for the same row of the same file, by their numbers, and seed."""
    return _draw(str(seed), "row", str(file), str(row))


def _draw(*parts: str) -> float:
    return int(fingerprint(*parts)[:13], 16) * DRAWS
