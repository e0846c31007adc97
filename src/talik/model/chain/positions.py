"""The last layer at the positions that count.

Behind the last layer comes the tail, which is asked for trained positions alone. Attention needs the key and
value of every token; the MLP, the projection before it and what else works on a token by itself does not.
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
    """Names of the outermost modules that work on each token by itself, and that no other token needs.

    Of those with a matrix. Found by trying: `run` is a forward of the layer over a few tokens, and what it
    gives, (batch, sequence, width), must stay the same at some of them where a module is run at these alone,
    and change there where it is run at the others: what sparse attention's indexer chooses keys by changes
    nothing as long as there are few.
    """
    whole = run()
    every = torch.arange(whole[..., 0].numel(), device=whole.device)
    rows, others = every[1::2], every[::2]

    def same(names: Iterable[str], where: Tensor = rows) -> bool:
        try:
            with at_rows(layer, names, where) as calls:
                part = run()
        except Exception:  # whatever a module says that is given other shapes than it wants
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
    """Inside, these modules of a layer compute at some flat positions, and give zeros at the others.

    Hands out the names of those that were called.
    """
    calls: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in names:
            module = layer.get_submodule(name)
            stack.enter_context(replaced(module, partial(_forward, module.forward, rows, name, calls)))
        yield calls


def _forward(own: Callable[..., Any], rows: Tensor, name: str, calls: list[str], hidden: Tensor) -> Tensor:
    """In place of a module's own forward."""
    calls.append(name)
    out = own(hidden.flatten(0, 1)[rows][None]).squeeze(0)
    whole = out.new_zeros(hidden.shape[0] * hidden.shape[1], out.shape[-1])
    return whole.index_copy(0, rows, out).view(*hidden.shape[:2], -1)
