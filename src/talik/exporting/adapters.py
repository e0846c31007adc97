"""Exports adapters: merged into the weights, one layer at a time, or as a PEFT folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from talik.base.events import Notify
from talik.base.files import need_room
from talik.exporting.card import base_name
from talik.exporting.files import write_adapter_companions
from talik.model.adapters import adapted, base_tensors, merge_adapters, unmerged, write_adapter_folder
from talik.model.block import Block
from talik.model.freeze import freeze_for, trained_parameters
from talik.training.loading import open_run_model, working_dtype
from talik.training.run.checkpoints import load_weights
from talik.training.run.folder import Run

Named = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Merged(Mapping[str, Tensor]):
    """The tensors of the checkpoint that adapters change, merged when they are asked for.

    One layer is loaded at a time, on the device of the run, and stays until a tensor of another one is asked
    for.

    Args:
        run: The run.
        checkpoint: The folder of the checkpoint with the trained adapters.
        named: Maps tensors of the model to the names and shapes of the source's files.
    """

    def __init__(self, run: Run, checkpoint: Path, named: Named) -> None:
        plan = run.plan.model_copy(update={"trunk": "resident"})
        self._loaded, self._named = open_run_model(run.recipe, plan, run.model), named
        load_weights(checkpoint, trained_parameters(self._loaded.chain.model))
        self._layer_of = {
            name: layer
            for layer in range(plan.cut, plan.layers)
            for name in named({name: self._loaded.weights.hollow(name) for name in self._changed(layer)})
        }
        self._now: tuple[int, dict[str, Tensor]] = (-1, {})

    def __getitem__(self, name: str) -> Tensor:
        layer = self._layer_of[name]
        if self._now[0] != layer:
            self._now = (layer, self._named(self._merged(layer)))
        return self._now[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer_of)

    def __len__(self) -> int:
        return len(self._layer_of)

    def _changed(self, layer: int) -> list[str]:
        """The weights with adapters, and others that are made from the same tensors of the files."""
        prefix = f"{self._loaded.chain.parts.layers}.{layer}."
        with_adapters = [f"{prefix}{name}.weight" for name in adapted(self._loaded.chain.layers[layer])]
        return self._loaded.weights.made_with(with_adapters)

    def _merged(self, layer: int) -> dict[str, Tensor]:
        block, own = self._loaded.chain.layers[layer], f"{self._loaded.chain.parts.layers}.{layer}."
        self._loaded.store.get(Block.layer(layer))
        merge_adapters(block)
        held = base_tensors(block)
        found = {n: held[n.removeprefix(own)].detach().cpu() for n in self._changed(layer)}
        unmerged(block)
        self._loaded.store.release(Block.layer(layer))
        return found


def write_adapter(run: Run, checkpoint: Path, folder: Path, card: str, notify: Notify) -> int:
    """Writes the trained adapters as a PEFT folder with everything needed to use them; returns its bytes."""
    weights = checkpoint / "weights.safetensors"
    need_room(folder, weights.stat().st_size, "export")
    model = run.model.hollow(working_dtype(run.recipe))
    freeze_for(model, run.recipe)
    write_adapter_folder(model, weights, folder, base_name(run))
    write_adapter_companions(run.model, folder, card, notify)
    return sum(file.stat().st_size for file in folder.iterdir())
