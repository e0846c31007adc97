"""Memory of the micro-batches of a step that are pending while the simulated ones are computed."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from talik.data.examples import Example
from talik.model.chain.chain import Skeleton
from talik.recipe.plan import Plan
from talik.training.run.feed import load_micro_batches
from talik.training.step.top import MicroBatch, Top
from talik.training.trunk.interfaces import HiddenStates


class Pending:
    """Allocates the tensors of pending micro-batches; leaving the context frees them.

    With a resident top these are the micro-batches themselves. With a streamed top each of them also has a
    skeleton, the gradient of its hidden states, and one input per layer span. Layer inputs are allocated
    together with those of the first computed micro-batch, by `allocate_inputs`.

    Args:
        top: The trained part of the model.
        examples: All examples.
        indices: The examples of the pending micro-batches.
        states: The hidden states of the examples; None if there is no cache.
        plan: The plan.
    """

    def __init__(
        self,
        top: Top,
        examples: Sequence[Example],
        indices: Sequence[int],
        states: HiddenStates | None,
        plan: Plan,
    ) -> None:
        self._batches = list(load_micro_batches(examples, indices, states, plan, top.chain))
        self._skeletons: list[Skeleton] = []
        self._gradients: list[Tensor] = []
        self._input_shapes: dict[int, tuple[int, int]] = {}
        self._inputs: dict[int, Tensor] = {}
        self._dtype = top.chain.dtype_at(plan.cut)
        if plan.top == "streamed" and self._batches:
            for batch in self._batches:
                self._add_streamed(batch, top, plan)
            if plan.inputs == "memory":
                self._input_shapes = self._shapes_of_inputs(top, cached=states is not None)

    def __enter__(self) -> Pending:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tensors in (self._batches, self._skeletons, self._gradients, self._inputs):
            tensors.clear()

    def allocate_inputs(self, layer: int) -> None:
        """Allocates the inputs of a layer, if it is the first of a layer span and has none yet."""
        if layer in self._input_shapes and layer not in self._inputs:
            self._inputs[layer] = torch.empty(self._input_shapes[layer], dtype=self._dtype)

    def free_inputs_above(self, layer: int) -> None:
        """Frees the inputs of higher layers, whose backward is done for all micro-batches."""
        for above in [other for other in self._inputs if other > layer]:
            del self._inputs[above]

    def _add_streamed(self, batch: MicroBatch, top: Top, plan: Plan) -> None:
        self._skeletons.append(top.chain.skeleton(batch.input_ids, embed=False))
        width = top.chain.width_at(plan.cut)
        self._gradients.append(torch.empty(batch.input_ids.numel(), width, dtype=self._dtype))

    def _shapes_of_inputs(self, top: Top, *, cached: bool) -> dict[int, tuple[int, int]]:
        """The shape of all pending inputs by layer; with a cache, the micro-batches have the first."""
        tokens = sum(batch.input_ids.numel() for batch in self._batches)
        spans = top.layer_spans()[1:] if cached else top.layer_spans()
        return {span[0]: (tokens, top.chain.width_at(span[0])) for span in spans}
