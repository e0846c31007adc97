"""A finding of a diagnosis: what, where, the number, and the line to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from talik.base.files import format_bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake.

    Attributes:
        habit: Its name (`talik explain MODEL --habit NAME`, if it can be simulated).
        what: A sentence.
        where: A block, a parameter, a hook or a key of the batch.
        number: An amount in `unit`: bytes, tokens, rows, numbers.
        line: The code to write instead, or a command.
    """

    habit: str
    what: str
    where: str
    number: int
    unit: str
    line: str

    @property
    def amount(self) -> str:
        """The number with its unit: '3.4 GiB', '12 tokens'."""
        if self.unit == "bytes":
            return format_bytes(self.number)
        return f"{self.number:,} {self.unit.removesuffix('s') if self.number == 1 else self.unit}"

    def as_dict(self) -> dict[str, Any]:
        """All values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(finding: Finding) -> Iterator[str]:
    yield f"{finding.habit}: {finding.amount}"
    yield fill(finding.what, 100, initial_indent="  ", subsequent_indent="  ")
    yield f"  where   {finding.where}"
    first, *more = finding.line.splitlines()
    yield f"  change  {first}"
    yield from (f"          {line}" for line in more)
