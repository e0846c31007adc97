"""The inputs of a training step: the thawed top, its micro-batches, and store, scratch and monitor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from talik.model.block import EMBEDDINGS, TAIL, Block
from talik.model.chain.chain import Chain
from talik.training.memory.scratch import Scratch
from talik.training.memory.store import Store


@runtime_checkable
class Monitor(Protocol):
    """Receives the scalars of a step, as tensors, and the start of its phases.

    `phase(name, size)` marks the start of a phase ("forward", "loss", ...). `size` is its workload: the
    tokens of a micro-batch or the parameters of a block; 0 if it does not vary.
    """

    def scalar(self, name: str, value: Float[Tensor, ""]) -> None: ...
    def phase(self, name: str, size: int = 0, /) -> None: ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A few examples, right-padded.

    There is no attention mask: the chain is causal (this was checked), so that no token attends to the
    padding on its right.

    Attributes:
        input_ids: The tokens.
        hidden: The hidden states that enter the first layer of the top; None if there is no trunk, because
            the embeddings are trained.
        positions: Flat positions (row times sequence plus column) whose next token is trained.
        targets: These next tokens.
    """

    input_ids: Int[Tensor, "batch sequence"]
    hidden: Float[Tensor, "batch sequence hidden"] | None
    positions: Int[Tensor, " trained"]
    targets: Int[Tensor, " trained"]


@dataclass(frozen=True, slots=True)
class World:
    """The three objects through which a step reads and writes anything outside it."""

    store: Store
    scratch: Scratch
    monitor: Monitor


@dataclass(frozen=True, slots=True)
class Top:
    """The thawed part of a model.

    Attributes:
        chain: The model.
        cut: The first layer of the top.
        blocks: The blocks of the top in the order they run. For each, its trained parameters: the name of
            their gradient and state, and their path in the model. The two differ for a head that is tied to
            the embeddings: its gradient has the name of the embeddings.
    """

    chain: Chain
    cut: int
    blocks: dict[Block, dict[str, str]]

    def of(self, block: Block) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters of a block as they are now: hollow unless the block is loaded."""
        for name, path in self.blocks.get(block, {}).items():
            yield name, self.chain.model.get_parameter(path)

    def needs_loading(self, block: Block) -> bool:
        """True if trained parameters of the block are not in memory. Adapters always are."""
        return any(parameter.is_meta for _, parameter in self.of(block))

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trained parameter once."""
        seen: set[str] = set()
        for block in self.blocks:
            yield from ((name, own) for name, own in self.of(block) if name not in seen)
            seen.update(self.blocks[block])

    def last_block(self, name: str) -> Block:
        """The block whose backward completes the gradient of a parameter."""
        return next(block for block, names in self.blocks.items() if name in names)

    @property
    def embeddings(self) -> bool:
        """True if the embeddings are trained, so that there is no trunk."""
        return EMBEDDINGS in self.blocks

    def layer_spans(self) -> list[range]:
        """The layers of the top, split into spans that must run together.

        A span has several layers if they share state other than the hidden states; mostly it has one.
        """
        count = len(self.chain.layers)
        starts = [i for i in range(self.cut, count) if self.chain.lowest_cut(i)[0] == i]
        return [range(*bounds) for bounds in zip(starts, [*starts, count][1:], strict=True)]

    def train_mode(self, on: bool) -> None:
        """Turns dropout in the top on or off; it is always off in the trunk."""
        self.chain.model.eval()
        for layer in self.chain.layers[self.cut :]:
            layer.train(on)


def make_top(chain: Chain, trained: Iterable[str], cut: int | None = None) -> Top:
    """Sorts the names of trained parameters into blocks.

    Args:
        chain: The model.
        trained: The names of the trained parameters.
        cut: The first layer of the top; by default the lowest layer with a trained parameter. It is given
            where it is lower, because layers share state.
    """
    parts, names = chain.parts, list(trained)
    block_of = {name: Block.of_part(parts.part(name)) for name in names}
    blocks: dict[Block, dict[str, str]] = {EMBEDDINGS: {}} if EMBEDDINGS in block_of.values() else {}
    cut = _lowest(block_of.values(), len(chain.layers)) if cut is None else cut
    blocks |= {Block.layer(i): {} for i in range(cut, len(chain.layers))}
    blocks[TAIL] = {}
    for name in names:
        blocks[block_of[name] if block_of[name] in blocks else TAIL][name] = name
    table, head = f"{parts.embedding}.weight", f"{parts.head}.weight"
    if parts.tied and table in names:
        blocks[TAIL][table] = head
    return Top(chain, cut, blocks)


def _lowest(blocks: Iterable[Block], count: int) -> int:
    """The lowest layer among some blocks: 0 if the embeddings are among them, `count` if no layer is."""
    found = set(blocks)
    return 0 if EMBEDDINGS in found else min((b.index for b in found if b.index is not None), default=count)
