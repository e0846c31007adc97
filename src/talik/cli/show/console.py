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
    """Prints a result to stdout; a string is printed as it is."""
    out.print(Text(text) if isinstance(text, str) else text)


def piece(text: str) -> None:
    """Prints a part of an answer as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def questions() -> Iterator[str]:
    """Lines that somebody types, until an empty one or the end of the input."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def result_json(value: Any) -> None:
    """Prints a value for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def said(topic: str, text: str) -> None:
    """One line about what is going on."""
    err.print(Text.assemble((f"{topic:<9}", "bold"), text))


def failure(error: TalikError) -> None:
    """What went wrong, where, and what to do."""
    err.print(Text.assemble(("error    ", "bold red"), str(error)))
