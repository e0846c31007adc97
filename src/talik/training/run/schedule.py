"""The learning-rate schedule."""

from __future__ import annotations

import math

from talik.recipe.recipe import Recipe


def learning_rate_at(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 1) of `steps`: linear warmup, then the recipe's schedule."""
    warmup = round(recipe.warmup * steps)
    if step <= warmup:
        return recipe.learning_rate * step / warmup
    left = 1 - (step - warmup - 1) / max(steps - warmup, 1)
    if recipe.schedule == "linear":
        return recipe.learning_rate * left
    if recipe.schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1 - math.cos(math.pi * left))
    return recipe.learning_rate
