"""Summarises the plan of a run on the checked data with the default settings."""

from __future__ import annotations

from array import array
from functools import cache

from talik.base.errors import TalikError
from talik.base.events import Notify
from talik.check.statistics import Statistics
from talik.data.examples import Example, Span
from talik.data.reading.rows import Place
from talik.model.folder import ModelFolder
from talik.plan.report import short_text
from talik.plan.search import plan_run
from talik.recipe.recipe import Recipe

_PLACE = Place("-", 1)


def plan_lines(statistics: Statistics, recipe: Recipe, model: ModelFolder, notify: Notify) -> list[str]:
    """Plans a run on examples of these lengths; returns a summary, or the reason why there is no plan.

    Examples over the recipe's greatest length are left out, as with the default of `--too-long`.
    """
    if not (model.path / "config.json").is_file():
        return ["none: the model's folder has no config.json"]
    sizes = zip(statistics.lengths, statistics.trained, strict=True)
    examples = [_example(*size) for size in sizes if size[0] <= recipe.max_length]
    if not examples:
        return ["none: no example can be trained"]
    try:
        top = min(recipe.top_layers, model.layers)
        usual = recipe.model_copy(update={"top_layers": top, "eval_data": None, "held_out": 0.0})
        planned = plan_run(usual, model, examples, notify=notify)
    except TalikError as error:
        return [f"none: {error.problem}"]
    head = f"training the top {top} layers as `talik train` does by default:"
    return [head, *short_text(planned)]


@cache
def _example(length: int, trained: int) -> Example:
    """Makes an example with these numbers of tokens; a plan depends on nothing else."""
    masked = max(1, length - trained)
    spans = (Span(0, masked, False), Span(masked, length, True))
    return Example(array("i", [0]) * length, spans, _PLACE)
