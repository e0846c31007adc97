"""Everything that Talik raises on purpose, on one screen.

    TalikError                     exit 1   the run failed
    ├── UsageError                 exit 2   what was asked for cannot be done as asked
    │   ├── RecipeError                     wrong fields of a recipe, all of them at once
    │   ├── SourceError                     the model cannot be found, read or used
    │   ├── DataError                       a row, a file of rows, an example
    │   ├── RunError                        a run folder that is missing, taken or of another recipe
    │   ├── NoRoomError                     not enough room on the disk
    │   └── SeveralErrors                   several of these that have nothing to do with each other
    ├── DoesNotFitError            exit 3   more memory than there is
    ├── ChainError                 exit 1   the chain does not give what the model's own forward gives
    ├── DataProblemsError          exit 1   a data set that was checked has problems
    ├── NonFiniteError             exit 1   a loss or a gradient that is not a number
    └── InterruptedRunError        exit 1   Ctrl-C; what was done is saved

An error says what happened, where (file, line, field), the number, and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class TalikError(Exception):
    """The base class of all errors of Talik.

    Attributes:
        problem: What happened, in one sentence.
        where: The file, line or field; None if there is none.
        remedy: What the user can do about it; None if nothing is known.
    """

    exit_code = 1

    def __init__(self, problem: str, *, where: object = None, remedy: str | None = None) -> None:
        self.problem, self.where, self.remedy = problem, where, remedy
        text = problem if where is None else f"{where}: {problem}"
        super().__init__(text if remedy is None else f"{text}\n  {remedy}")


class UsageError(TalikError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class RecipeError(UsageError):
    """Fields of a recipe that are unknown, wrong or contradict each other."""


class SourceError(UsageError):
    """A model that cannot be found, read or used."""


class DataError(UsageError):
    """A file of rows, a row or an example that cannot be used; `where` is the file and the line."""


class RunError(UsageError):
    """A run folder that is missing, already taken, or belongs to another recipe."""


class NoRoomError(UsageError):
    """Not enough room on the disk for what is about to be written."""


class SeveralErrors(UsageError):
    """Several independent mistakes, reported at once.

    Attributes:
        errors: The mistakes.
    """

    def __init__(self, errors: list[UsageError]) -> None:
        self.errors = errors
        super().__init__(numbered_list([str(error).replace("\n", "\n  ") for error in errors]))


class DoesNotFitError(TalikError):
    """The run needs more memory than there is."""

    exit_code = 3


class ChainError(TalikError):
    """The chain of blocks does not give what the model's own forward gives."""


class NonFiniteError(TalikError):
    """A loss or a gradient norm that is infinite or not a number."""


class DataProblemsError(TalikError):
    """A data set that was checked has problems; they have been shown."""


class InterruptedRunError(TalikError):
    """Stopped by Ctrl-C after saving."""


def numbered_list(problems: list[str]) -> str:
    """The problems, one per line, with their number first if there are several."""
    return "\n  ".join(problems if len(problems) == 1 else [f"{len(problems)} problems:", *problems])


def collect_errors(*parts: Callable[[], Any]) -> list[Any]:
    """Calls every part and returns the results.

    Raises:
        UsageError: The mistake of one part, or SeveralErrors with those of all parts.
    """
    results: list[Any] = []
    errors: list[UsageError] = []
    for part in parts:
        try:
            results.append(part())
        except UsageError as error:
            errors += error.errors if isinstance(error, SeveralErrors) else [error]
    if errors:
        raise errors[0] if len(errors) == 1 else SeveralErrors(errors)
    return results
