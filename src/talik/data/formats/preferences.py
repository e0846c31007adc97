"""Recognises rows of preference data. A rejected answer must not be trained as a good one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from talik.data.reading.rows import RowError

PREFERENCES = "preferences"
LABELS = ("label", "kto_tag")
_TRUTH = {True, False, "true", "false", "True", "False", "TRUE", "FALSE"}
REMEDY = "Keep only the good answers, as rows with 'prompt' and 'completion' (without the label)."


def check_preferences(fields: Mapping[str, Any], needs: Sequence[str]) -> None:
    """Checks that a row is not preference data.

    Args:
        fields: The row.
        needs: The fields that the format needs. In a format with turns the labels 0 and 1 count, too.

    Raises:
        RowError: The row has a chosen and a rejected answer, or a label for good and bad answers.
    """
    names = {name.lower(): name for name in fields}
    if "chosen" in names and "rejected" in names:
        problem = "the row has a chosen and a rejected answer; training on preferences is not supported yet"
        raise RowError(PREFERENCES, problem, names["rejected"], REMEDY)
    for label in LABELS:
        value = fields.get(names.get(label, label))
        if isinstance(value, bool | str | int) and (
            value in _TRUTH if tuple(needs) != ("text",) else value is True
        ):
            problem = (
                f"field '{names[label]}' says whether the answer is good; training on preferences is not "
                "supported yet"
            )
            raise RowError(PREFERENCES, problem, names[label], REMEDY)
