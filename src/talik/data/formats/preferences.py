"""Rows of preferences: named, because an answer that somebody rejected must not be trained as a good one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from talik.data.reading.rows import RowError

PREFERENCES = "preferences"
LABELS = ("label", "kto_tag")
_TRUTH = {True, False, "true", "false", "True", "False", "TRUE", "FALSE"}
REMEDY = "Keep only the good answers, as rows with 'prompt' and 'completion' (without the label)."


def check_preferences(fields: Mapping[str, Any], needs: Sequence[str]) -> None:
    """Checks that a row is not a preference.

    Args:
        fields: The row.
        needs: The fields that its format needs: of a format with turns, 0 and 1 are labels, too.

    Raises:
        RowError: It has a chosen and a rejected answer, or a label that says whether the answer is good.
    """
    names = {name.lower(): name for name in fields}
    if "chosen" in names and "rejected" in names:
        problem = "the row has a chosen and a rejected answer; training on preferences is not possible yet"
        raise RowError(PREFERENCES, problem, names["rejected"], REMEDY)
    for label in LABELS:
        value = fields.get(names.get(label, label))
        if isinstance(value, bool | str | int) and (
            value in _TRUTH if tuple(needs) != ("text",) else value is True
        ):
            problem = (
                f"field '{names[label]}' says whether the answer is good; training on preferences is not "
                "possible yet"
            )
            raise RowError(PREFERENCES, problem, names[label], REMEDY)
