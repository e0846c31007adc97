"""Plans a recipe: finds model and data, plans the run, and looks for changes if it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

from talik.base.events import Notify
from talik.data.dataset import Data, check_positions, read_sets
from talik.machine.machine import described_machine
from talik.model.folder import ModelFolder, open_model
from talik.model.tokenizer import load_tokenizer
from talik.plan.changes import most_layers, smallest_changes
from talik.plan.planned import Planned
from talik.plan.search import plan_run
from talik.plan.target import machine_here, target_of
from talik.recipe.recipe import Recipe


def plan_asked(
    recipe: Recipe,
    *,
    data: bool,
    machine: str | None = None,
    most: bool = False,
    sizes: Mapping[str, int | None],
    notify: Notify,
) -> Planned:
    """Plans a run, and finds the smallest changes that would make it fit if it does not.

    Args:
        recipe: The recipe.
        data: Whether to read its data; without, every example is taken to be as long as the recipe allows.
        machine: The name of a GPU or a file that describes a machine; None for this one.
        most: Whether to train as many top layers as fit, in place of the recipe's number.
        sizes: Limits in bytes, by the names "memory", "ram" and "disk".
        notify: Gets the events.
    """
    model = open_model(recipe.model, revision=recipe.revision, weights=False)
    training, evaluation = _read(recipe, model, notify) if data else (None, None)
    sets = (training.examples if training else None, evaluation.examples if evaluation else ())
    if training:
        check_positions(model.config, training, evaluation)
    else:
        positions = getattr(model.text_config, "max_position_embeddings", None) or recipe.max_length
        recipe = recipe.model_copy(update={"max_length": min(recipe.max_length, positions)})
    computer = described_machine(machine) if machine else machine_here(recipe.device, notify)
    target = target_of(computer, **sizes)
    if most:
        layers = most_layers(recipe, model, sets, target, notify)
        recipe = recipe.model_copy(update={"top_layers": layers})
    planned = plan_run(recipe, model, *sets, target=target, notify=notify)
    if planned.fits:
        return planned
    changes = smallest_changes(planned, recipe, model, sets, notify)
    return dataclasses.replace(planned, changes=changes)


def _read(recipe: Recipe, model: ModelFolder, notify: Notify) -> tuple[Data, Data | None]:
    sets = read_sets(recipe, model.tokenizer(), load=partial(load_tokenizer, model.path), notify=notify)
    for found in sets:
        if found is not None:
            notify(found)
    return sets
