"""Runs the last layer only at the positions that are needed.

The tail needs trained positions only. Attention needs the keys and values of every token; the MLP, the
projection before it and other modules that work on each token separately do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from talik.model.chain.forms import replaced


def find_alone(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[str, ...]:
    """Names of the outermost modules with a matrix that work on each token separately, for that token only.

    Found by trying. `run` is a forward of the layer over a few tokens with the output (batch, sequence,
    width). If a module is run at some positions only, the output must stay the same there; if it is run at
    the others only, the output must change there. The second condition excludes the indexer of sparse
    attention, which has no effect as long as there are few tokens.
    """
    whole = run()
    every = torch.arange(whole[..., 0].numel(), device=whole.device)
    rows, others = every[1::2], every[::2]

    def same(names: Iterable[str], where: Tensor = rows) -> bool:
        try:
            with at_rows(layer, names, where) as calls:
                part = run()
        except Exception:  # modules raise errors of many types for unexpected shapes
            return False
        return len(calls) > 0 and torch.equal(part.flatten(0, 1)[rows], whole.flatten(0, 1)[rows])

    found: list[str] = []
    for name, module in layer.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        matrices = any(parameter.dim() > 1 for parameter in module.parameters())
        if name and matrices and not inside and same([name]) and not same([name], others):
            found.append(name)
    return tuple(found) if found and same(found) else ()


@contextlib.contextmanager
def at_rows(layer: nn.Module, names: Iterable[str], rows: Int[Tensor, " rows"]) -> Iterator[list[str]]:
    """Inside the context, these modules of a layer compute at some flat positions and return zeros elsewhere.

    Yields the names of the modules that were called.
    """
    calls: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in names:
            module = layer.get_submodule(name)
            stack.enter_context(replaced(module, partial(_forward, module.forward, rows, name, calls)))
        yield calls


def _forward(own: Callable[..., Any], rows: Tensor, name: str, calls: list[str], hidden: Tensor) -> Tensor:
    """Replaces a module's own forward."""
    calls.append(name)
    out = own(hidden.flatten(0, 1)[rows][None]).squeeze(0)
    whole = out.new_zeros(hidden.shape[0] * hidden.shape[1], out.shape[-1])
    return whole.index_copy(0, rows, out).view(*hidden.shape[:2], -1)
