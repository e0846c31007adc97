"""Parses the field `lora` of a recipe: "rank=16,alpha=32,targets=all,dropout=0.05,dora"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from talik.base.errors import UsageError

FORM = "rank=16,alpha=32,targets=all or q_proj+v_proj,dropout=0.05,dora: any of these, commas between"
RANK = 16


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters: W + alpha / rank * B A, with A and B trained (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: Rows of A and columns of B.
        alpha: The scale.
        targets: Names of linear layers, or their last parts; empty for every linear layer.
        dropout: Dropout on the input of A.
        dora: Train the norm of each row of W separately (Liu et al. 2024, arXiv 2402.09353).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    dora: bool = False


def parse_lora(line: str) -> Lora:
    """Parses the adapters of a recipe; without alpha it is twice the rank.

    Raises:
        UsageError: The line is not written as described.
    """
    fields: dict[str, Any] = {}
    for part in (part.strip() for part in line.split(",")):
        name, _, value = part.partition("=")
        read = {"rank": _rank, "alpha": _alpha, "targets": _targets, "dropout": _share, "dora": _dora}
        try:
            if name in fields:
                raise ValueError
            fields[name] = read[name](value)
        except (ValueError, KeyError):
            raise UsageError(f"lora: {part!r} is not of the form {FORM}, each once") from None
    rank = fields.setdefault("rank", RANK)
    return Lora(**{"alpha": 2.0 * rank, **fields})


def _rank(value: str) -> int:
    return int(_within(int(value) >= 1, value))


def _alpha(value: str) -> float:
    return float(_within(0 < float(value) < float("inf"), value))


def _share(value: str) -> float:
    return float(_within(0 <= float(value) < 1, value))


def _targets(value: str) -> tuple[str, ...]:
    names = tuple(_within(bool(name), name) for name in value.split("+"))
    return () if names == ("all",) else names


def _dora(value: str) -> bool:
    return not _within(not value, value)


def _within(holds: bool, value: str) -> str:
    if not holds:
        raise ValueError
    return value
