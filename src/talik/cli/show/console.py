"""The only module that prints. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from talik.base.errors import TalikError

if TYPE_CHECKING:
    pass

# Counts of a report that are shown where they are not 0.

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def result(text: Any) -> None:
    """Prints a result to stdout; a string is printed unchanged."""
    out.print(Text(text) if isinstance(text, str) else text)


def piece(text: str) -> None:
    """Prints a part of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def questions() -> Iterator[str]:
    """Yields typed lines until an empty one or the end of the input."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def result_json(value: Any) -> None:
    """Prints a value as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def said(topic: str, text: str) -> None:
    """Prints one line of progress."""
    err.print(Text.assemble((f"{topic:<9}", "bold"), text))


def failure(error: TalikError) -> None:
    """Prints an error."""
    err.print(Text.assemble(("error    ", "bold red"), str(error)))
