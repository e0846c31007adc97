"""Talik fine-tunes the thawed top of a language model while the frozen trunk below costs almost nothing.

    import talik
    talik.train(talik.Recipe(model="Qwen/Qwen2.5-0.5B-Instruct", data="questions.jsonl"), "runs/first")

Names are imported when they are first used, so that `import talik` is quick.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from talik.data.batches import collate as collate
    from talik.data.dataset import preview as preview
    from talik.data.dataset import read_data as read_data
    from talik.evaluate import evaluate as evaluate
    from talik.export import export as export
    from talik.model.chain import Chain as Chain
    from talik.model.chain import verify_chain as verify_chain
    from talik.model.freeze import freeze as freeze
    from talik.model.inspection import inspect_model as inspect_model
    from talik.plan.explain import explain as explain
    from talik.recipe import Plan as Plan
    from talik.recipe import Recipe as Recipe
    from talik.run import resume as resume
    from talik.run import train as train
    from talik.train.drop_in import drop_in as drop_in
    from talik.train.loss import chunked_loss as chunked_loss

__version__ = "0.1.0"

# Of the programs that oneDNN makes to multiply bf16 matrices, 0.3 MiB for every shape, torch and oneDNN keep
# 1,024 each: memory grew with the number of lengths. Both read how many at the first product, never again.
# A layer needs fewer than these.
SETTLED = {"LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
for _name, _value in SETTLED.items():
    os.environ.setdefault(_name, _value)

_HOMES = {
    "Chain": "model.chain",
    "Plan": "recipe",
    "Recipe": "recipe",
    "chunked_loss": "train.loss",
    "collate": "data.batches",
    "drop_in": "train.drop_in",
    "evaluate": "evaluate",
    "explain": "plan.explain",
    "export": "export",
    "freeze": "model.freeze",
    "inspect_model": "model.inspection",
    "preview": "data.dataset",
    "read_data": "data.dataset",
    "resume": "run",
    "train": "run",
    "verify_chain": "model.chain",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


class _Public(property):
    """A public name, looked up in its home. Importing a submodule of the same name does not replace it."""

    def __init__(self, name: str) -> None:
        super().__init__(lambda _: getattr(import_module(f"talik.{_HOMES[name]}"), name), lambda *_: None)


class _Talik(ModuleType):
    """`talik.train` is a function; the package of that name is reached by `from talik.train import ...`."""


for _name in _HOMES:
    setattr(_Talik, _name, _Public(_name))
sys.modules[__name__].__class__ = _Talik
