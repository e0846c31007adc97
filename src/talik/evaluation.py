"""Loss, perplexity and accuracy per trained token, computed from the same cache as training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from talik.base.errors import collect_errors
from talik.base.events import Notify, Status, silent
from talik.data.dataset import check_files, check_positions, read_all
from talik.kernels.bf16_matmul import bf16_as_fp32
from talik.machine.device import choose_device
from talik.model.folder import open_model
from talik.model.tokenizer import load_tokenizer
from talik.model.weights.working_copy import SavedWeights
from talik.plan.ways import choose
from talik.recipe.recipe import checked_recipe
from talik.training.loading import open_run_model
from talik.training.run.checkpoints import load_weights
from talik.training.run.evaluation import evaluate_ranges
from talik.training.run.folder import is_run, open_run, result_checkpoint
from talik.training.trunk.trunk import trunk_states


def evaluate(
    target: str | Path, data: str | Path | Sequence[str], *, notify: Notify = silent, **options: Any
) -> dict[str, Any]:
    """Evaluates a run or a model on rows of data.

    A run is evaluated twice from one cache: with the base model's top and with the tuned one.

    Args:
        target: A run folder or a model.
        data: Rows, named as in a recipe.
        notify: Gets the events.
        **options: Fields of a Recipe that concern data; by default those of the run.

    Returns:
        "examples" and "trained_tokens"; "base" and "tuned" for a run or "model" for a model, each with
        "loss",
        "perplexity" and "accuracy"; for several sources also "by_source".
    """
    checkpoint = date = None
    if is_run(target):
        run = open_run(target, notify)
        recipe, plan, model, date = run.recipe, run.plan, run.model, run.date
        recipe, checkpoint = (
            checked_recipe({**recipe.model_dump(), **options}),
            result_checkpoint(run.folder, notify),
        )
    else:
        model = open_model(str(target), progress=lambda text: notify(Status("model", text)))
        precision = "fp32" if model.config.dtype in (None, torch.float32) else "bf16"
        given = str(data) if isinstance(data, str | Path) else list(data)
        recipe = checked_recipe({"model": str(target), "data": given, "precision": precision, **options})
        recipe = recipe.model_copy(update={"thaw": "norm"})  # the whole model is below the cut
        plan = choose(recipe, model, notify)
    sources = checked_recipe(
        {"model": "-", "data": str(data) if isinstance(data, str | Path) else list(data)}
    ).data
    there = recipe.model_copy(update={"data": sources, "eval_data": None})
    collect_errors(partial(choose_device, plan.device), partial(check_files, there))
    loader = partial(load_tokenizer, model.path, date)
    found = read_all(recipe, sources, model.tokenizer(date), "evaluation", load=loader, notify=notify)
    notify(found)
    check_positions(model.config, found)
    torch.set_num_threads(plan.threads)
    loaded = open_run_model(recipe, plan, model)
    with bf16_as_fp32(), trunk_states(loaded, [found.examples], recipe, notify) as [states]:
        top = loaded.top()
        found_by = {}

        def measure(name: str) -> dict[str, Any]:
            whole, found_by[name] = evaluate_ranges(
                top, found.examples, states, plan, loaded.store, found.ranges
            )
            return {"trained_tokens": whole.trained_tokens, name: whole.measures()}

        report = {"examples": len(found.examples), **measure("base" if checkpoint else "model")}
        if checkpoint is not None:
            loaded.weights.changed = SavedWeights(
                checkpoint / "weights.safetensors"
            )  # what is loaded from here on
            load_weights(checkpoint, dict(top.parameters()))
            report |= measure("tuned")
    by_source = {
        source: {name: parts[source].measures() for name, parts in found_by.items()}
        for source in next(iter(found_by.values()))
    }
    return report | ({"by_source": by_source} if by_source else {})
