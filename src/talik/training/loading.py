"""Opens the model of a run without its weights, and loads its trunk and top when they are needed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from talik.base.errors import ChainError
from talik.data.examples import Example
from talik.machine.device import choose_device
from talik.model.adapters import base_tensors, fill_adapters, has_lengths, measure_lengths
from talik.model.adapters import in_words as adapters_in_words
from talik.model.block import EMBEDDINGS, REST, TAIL, Block
from talik.model.chain.chain import Chain
from talik.model.chain.verify import verify_layers
from talik.model.folder import ModelFolder
from talik.model.freeze import freeze_for, trained_parameters
from talik.model.loading import load_model
from talik.model.weights.weights import Weights
from talik.model.weights.working_copy import SavedWeights, WorkingCopy
from talik.recipe.plan import Plan
from talik.recipe.recipe import Recipe
from talik.recipe.thaw import layers_in_words
from talik.training.memory.scratch import Scratch, TieredScratch
from talik.training.memory.store import FileStore, ResidentStore, Store
from talik.training.step.top import Top, make_top


def working_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype in which the model computes and is exported."""
    return torch.float32 if recipe.precision == "fp32" else torch.bfloat16


@dataclass(frozen=True, slots=True)
class RunModel:
    """The model of a run; its weights stay in their files until a block is loaded.

    Attributes:
        chain: The model as a chain of blocks.
        weights: The tables of its files.
        store: Loads and releases blocks.
        plan: How the run is carried out.
    """

    chain: Chain
    weights: Weights
    store: FileStore
    plan: Plan

    @contextlib.contextmanager
    def trunk(self) -> Iterator[Store]:
        """Provides the store for the trunk: layer by layer if it is streamed, else all of it is loaded."""
        if self.plan.trunk == "streamed":
            try:
                yield self.store
            finally:
                self.store.drop_buffers()
            return
        blocks = [EMBEDDINGS, *(Block.layer(i) for i in range(self.plan.cut))]
        for block in blocks:
            self.store.get(block)
        try:
            yield ResidentStore()
        finally:
            for block in blocks:
                self.store.release(block)

    def top(self) -> Top:
        """Returns the top; loads it for the rest of the run unless the plan streams it."""
        top = make_top(self.chain, trained_parameters(self.chain.model), self.plan.cut)
        if self.plan.top == "resident":
            for block in dict.fromkeys([*top.blocks, TAIL]):
                self.store.pin(block)
        for index in range(self.plan.cut, self.plan.layers):
            if has_lengths(self.chain.layers[index]):
                self.store.get(Block.layer(index))
                measure_lengths(self.chain.layers[index])
                self.store.release(Block.layer(index))
        self.weights.drop_staging()
        return top

    @contextlib.contextmanager
    def working(self, top: Top, folder: Path, checkpoint: Path | None = None) -> Iterator[Scratch]:
        """Provides the scratch of a run, and the working copy of a streamed top.

        Args:
            top: The trained part of the model.
            folder: Holds offloaded tensors and the working copy; removed at the end.
            checkpoint: The values of streamed weights are read from it until they are written.
        """
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
        scratch = TieredScratch(self.chain.device, folder, self.plan.tier)
        if self.plan.top == "streamed":
            sizes = {name: parameter.nbytes for name, parameter in top.parameters() if parameter.is_meta}
            saved = SavedWeights(checkpoint / "weights.safetensors") if checkpoint else None
            self.weights.changed = WorkingCopy(folder / "weights", sizes, saved, forget=self.weights.forget)
        try:
            yield scratch
        finally:
            self.store.drop_buffers()
            if isinstance(self.weights.changed, WorkingCopy):
                self.weights.changed.close()
            scratch.close()

    def check_chain(self, examples: Sequence[Example], store: Store) -> None:
        """Compares the chain with the model's own forward on a few tokens of two examples.

        Raises:
            ChainError: They differ, or the model cannot be run layer by layer.
        """
        report = "Nothing was trained. Please report the model and the versions that `pip list` shows."
        kind = type(self.chain.model).__name__
        try:
            difference = self.difference(examples, store)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            problem = f"{kind} cannot be run layer by layer: {type(error).__name__}: {error}"
            raise ChainError(problem, remedy=report) from error
        if difference:
            problem = f"the chain of {kind} differs from the model's own forward by {difference:.3g}"
            raise ChainError(problem, remedy=report)

    def difference(self, examples: Sequence[Example], store: Store) -> float:
        """The largest difference between the chain and the model's own forward, on a few tokens.

        The layers are compared one after the other, each while it is loaded.

        Args:
            examples: The first 16 tokens of the first and the first 8 of the last are used.
            store: Loads the layers below the cut.
        """
        rows = [list(examples[0].input_ids[:16]), list(examples[-1].input_ids[:8])]
        width = max(len(row) for row in rows)
        ids = [row + [0] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        store.get(EMBEDDINGS)
        device = self.chain.device
        tokens, mask = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
        largest = verify_layers(self.chain, tokens, mask, partial(self.around, store))
        self.store.release(TAIL)
        return largest

    @contextlib.contextmanager
    def around(self, store: Store, layer: int) -> Iterator[None]:
        """Keeps a layer loaded inside the context.

        The embeddings are released before layer 0, and the tail is loaded after the last layer.
        """
        below = store if layer < self.plan.cut else self.store
        if layer == 0:
            store.release(EMBEDDINGS)  # before the tail is loaded, which is as large
        below.get(Block.layer(layer))
        below.read_ahead(Block.layer(layer + 1))
        yield
        below.release(Block.layer(layer))
        if layer == self.plan.layers - 1:
            self.store.get(TAIL)


def open_run_model(recipe: Recipe, plan: Plan, folder: ModelFolder) -> RunModel:
    """Opens the model of a folder and freezes all parameters except for those that the recipe trains.

    Only adapters and a few small blocks are loaded.

    Raises:
        UsageError: The plan's device does not exist (a run may be resumed on another computer).
    """
    choose_device(plan.device)
    model = folder.hollow(working_dtype(recipe), plan.device)
    weights = Weights(model, folder.path)
    freeze_for(model, recipe)
    weights.look_again()
    weights.forget = weights.bytes_in_files(base_tensors(model)) > psutil.virtual_memory().available // 2
    return new_run_model(Chain(model, plan.device), weights, plan, recipe.seed)


def new_run_model(
    chain: Chain, weights: Weights, plan: Plan, seed: int, executor: Executor | None = None
) -> RunModel:
    """Creates the store for a plan, initialises adapters, and pins the blocks that are always used."""
    fill_adapters(chain.model, seed, torch.device(plan.device))
    first = 0 if plan.trunk == "streamed" else plan.cut
    end = plan.layers if "streamed" in (plan.trunk, plan.top) else plan.cut
    streamed = [Block.layer(i) for i in range(first, end)]
    top = make_top(chain, (), plan.cut)
    buffers = 1 + (max(map(len, top.layer_spans()), default=1) if plan.top == "streamed" else 1)
    store = FileStore(weights, torch.device(plan.device), streamed, executor, buffers)
    store.pin(REST)
    if chain.calls_need_embeddings:
        store.pin(EMBEDDINGS)
    return RunModel(chain, weights, store, plan)


def load_whole_model(recipe: Recipe, plan: Plan, folder: ModelFolder) -> tuple[PreTrainedModel, Top]:
    """Loads the whole model of a folder, and freezes all parameters except for those the recipe trains."""
    model = load_model(folder.path, working_dtype(recipe), plan.device)
    freeze_for(model, recipe)
    fill_adapters(model, recipe.seed, model.device)
    measure_lengths(model)
    return model, make_top(Chain(model), trained_parameters(model), plan.cut)


def describe_trained(loaded: RunModel, recipe: Recipe) -> str:
    """A sentence for the user about trained and frozen parameters."""
    named = loaded.chain.model.named_parameters()
    sizes = {name: parameter.numel() for name, parameter in named if parameter.requires_grad}
    parts = list(dict.fromkeys(loaded.chain.parts.part(name) for name in sizes))
    layers = {layer: f"layer {layer}" in parts for layer in range(loaded.plan.layers)}
    shown = layers_in_words(layer for layer, trained in layers.items() if trained)
    shown += [part for part in parts if not part.startswith("layer ")]
    trained, total = sum(sizes.values()), loaded.weights.parameters
    if recipe.lora is not None:
        share = f"{trained:,} parameters in addition to {total:,} frozen ones ({100 * trained / total:.1f} %)"
        return f"{', '.join(shown)}: {recipe.lora}, {adapters_in_words(loaded.chain.model)}; {share}"
    share = f"{trained:,} of {total:,} parameters ({100 * trained / total:.1f} %)"
    frozen = layers_in_words(layer for layer, trained in layers.items() if not trained)
    frozen += [] if "embeddings" in parts else ["the embeddings"]
    rest = f"{' and '.join(frozen)} are" if frozen else "nothing is"
    return f"{', '.join(shown)}: {share}; {rest} frozen"
