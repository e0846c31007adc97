"""The frozen trunk, run once: what it hands on is a constant of each token, so every epoch reads it back.

Examples of equal length go through together, unpadded, in an order that the data and `trunk_batch_tokens`
fix: a hidden state depends on the batch that it was computed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor

from talik.data.batches import equal_length_groups
from talik.data.labels import Example
from talik.events import Notify, Progress, Said
from talik.model.chain import Chain, run_layers
from talik.recipe import Plan, Recipe
from talik.system import home_folder
from talik.train.cache import Cache, cache_key, new_cache, open_cache
from talik.train.step import Top


def run_trunk(
    chain: Chain, cut: int, input_ids: Int[Tensor, "batch sequence"]
) -> Float[Tensor, "batch sequence hidden"]:
    """What the layers below the cut hand on for unpadded examples, on the model's device."""
    skeleton = chain.skeleton(input_ids)
    with torch.inference_mode():
        return run_layers(chain, range(cut), skeleton.embedded, skeleton.calls)


def cache_root(recipe: Recipe) -> Path:
    """The folder of all caches: the recipe's, or Talik's own."""
    return Path(recipe.cache) if recipe.cache else home_folder() / "cache"


def trunk_cache(top: Top, examples: Sequence[Example], recipe: Recipe, plan: Plan, notify: Notify) -> Cache:
    """The cache of these examples: found, or made by one pass over them."""
    root = cache_root(recipe)
    chain, lengths = top.chain, [example.length for example in examples]
    key = cache_key(chain, top.cut, examples, plan)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{key}.lock"):  # another process that wants the same one waits, and then finds it
        if found := open_cache(root, key, lengths, chain, top.cut):
            notify(Said("trunk", f"its {sum(lengths):,} tokens are in the cache already"))
            return found
        done = 0
        with new_cache(root, key, lengths, chain, top.cut) as writer:
            for group in equal_length_groups(lengths, plan.trunk_batch_tokens):
                ids = torch.tensor([list(examples[i].input_ids) for i in group], device=chain.device)
                for index, hidden in zip(group, run_trunk(chain, top.cut, ids).cpu(), strict=True):
                    writer.write(index, hidden)
                done += ids.numel()
                notify(Progress("trunk", done, sum(lengths)))
    return Cache(root / key, lengths, chain.hidden_size, chain.handed_on(top.cut))
