"""What a step works on: the thawed top, its micro-batches, and the three objects that stand for the world."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from talik.model.chain.chain import Chain
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store


@runtime_checkable
class Monitor(Protocol):
    """Where a step's scalars go; they stay tensors here.

    `phase` says what begins, "forward", "loss", ..., and how large that for which it does is: tokens of a
    micro-batch, parameters of a block; 0 where it is the same each time.
    """

    def scalar(self, name: str, value: Float[Tensor, ""]) -> None: ...
    def phase(self, name: str, size: int = 0, /) -> None: ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A few examples, right-padded: their tokens, what the trunk hands on, and the trained rows.

    There is no mask: the chain is causal (it was checked), so no token sees the padding to its right.

    `hidden` is None where there is no trunk, because the embeddings are trained. `rows` are flat positions
    whose next token is trained, `targets` those tokens.
    """

    input_ids: Int[Tensor, "batch sequence"]
    hidden: Float[Tensor, "batch sequence hidden"] | None
    rows: Int[Tensor, " trained"]
    targets: Int[Tensor, " trained"]


@dataclass(frozen=True, slots=True)
class World:
    """The three objects through which a step touches the world."""

    store: Store
    scratch: Scratch
    monitor: Monitor


@dataclass(frozen=True, slots=True)
class Top:
    """The thawed part: the chain, the cut, and each block's trained parameters, in the order they run.

    A block ("embeddings", "layer 17", "tail") has, for every parameter, the name that its gradient and state
    go by and where it is in the model: a head that is tied to the embeddings has theirs.
    """

    chain: Chain
    cut: int
    blocks: dict[str, dict[str, str]]

    def of(self, block: str) -> Iterator[tuple[str, nn.Parameter]]:
        """A block's trained parameters, as they are now: hollow unless the block is loaded."""
        for name, place in self.blocks.get(block, {}).items():
            yield name, self.chain.model.get_parameter(place)

    def away(self, block: str) -> bool:
        """Whether a block must be loaded to read or change what is trained of it; adapters never are."""
        return any(parameter.is_meta for _, parameter in self.of(block))

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained parameter once."""
        seen: set[str] = set()
        for block in self.blocks:
            yield from ((name, own) for name, own in self.of(block) if name not in seen)
            seen.update(self.blocks[block])

    def last_block(self, name: str) -> str:
        """The block in whose backward a parameter's gradient becomes whole."""
        return next(block for block, names in self.blocks.items() if name in names)

    @property
    def embeddings(self) -> bool:
        """Whether the embeddings are trained, so that nothing lies below the cut."""
        return "embeddings" in self.blocks

    def groups(self) -> list[range]:
        """The layers from the cut on, in groups that share what they do not hand on; mostly one each."""
        count = len(self.chain.layers)
        starts = [i for i in range(self.cut, count) if self.chain.lowest_cut(i)[0] == i]
        return [range(*bounds) for bounds in zip(starts, [*starts, count][1:], strict=True)]

    def train_mode(self, on: bool) -> None:
        """Dropout in the top is on while a step runs, and off otherwise; the trunk never has any."""
        self.chain.model.eval()
        for layer in self.chain.layers[self.cut :]:
            layer.train(on)


def make_top(chain: Chain, trained: Iterable[str], cut: int | None = None) -> Top:
    """Sorts the names of trained parameters into blocks.

    The cut is the first layer with a trained parameter, or given: lower, where layers share state.
    """
    parts, names = chain.parts, list(trained)
    of = {name: parts.part(name) for name in names}
    count = len(chain.layers)
    if cut is None:
        first = next((i for i in range(count) if f"layer {i}" in of.values()), count)
        cut = 0 if "embeddings" in of.values() else first
    blocks: dict[str, dict[str, str]] = {"embeddings": {}} if "embeddings" in of.values() else {}
    blocks |= {f"layer {i}": {} for i in range(cut, count)}
    blocks["tail"] = {}
    for name in names:
        blocks[of[name] if of[name] in blocks else "tail"][name] = name
    table, head = f"{parts.embedding}.weight", f"{parts.head}.weight"
    if parts.tied and table in names:
        blocks["tail"][table] = head
    return Top(chain, cut, blocks)
