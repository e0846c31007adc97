"""Talik fine-tunes the thawed top of a language model while the frozen trunk below costs almost nothing.

    import talik
    talik.train(talik.Recipe(model="Qwen/Qwen2.5-0.5B-Instruct", data="questions.jsonl"), "runs/first")

Names are imported when they are first used, so that `import talik` is quick.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from talik.base.errors import TalikError as TalikError
    from talik.data.batches import collate as collate
    from talik.data.dataset import preview as preview
    from talik.data.dataset import read_data as read_data
    from talik.diagnose.explanation import explain as explain
    from talik.evaluation import evaluate as evaluate
    from talik.exporting.whole import export as export
    from talik.model.chain.chain import Chain as Chain
    from talik.model.chain.verify import verify_chain as verify_chain
    from talik.model.freeze import freeze as freeze
    from talik.model.inspection import inspect_model as inspect_model
    from talik.recipe.plan import Plan as Plan
    from talik.recipe.recipe import Recipe as Recipe
    from talik.run import resume as resume
    from talik.run import train as train
    from talik.training.drop_in import drop_in as drop_in
    from talik.training.step.loss import chunked_loss as chunked_loss

__version__ = "0.1.0"

# Of the programs that oneDNN makes to multiply bf16 matrices, 0.3 MiB for every shape, torch and oneDNN keep
# 1,024 each: memory grew with the number of lengths. Both read how many at the first product, never again.
# A layer needs fewer than these.
SETTLED = {"LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
for _name, _value in SETTLED.items():
    os.environ.setdefault(_name, _value)

_MODULES = {
    "Chain": "talik.model.chain.chain",
    "Plan": "talik.recipe.plan",
    "Recipe": "talik.recipe.recipe",
    "TalikError": "talik.base.errors",
    "chunked_loss": "talik.training.step.loss",
    "collate": "talik.data.batches",
    "drop_in": "talik.training.drop_in",
    "evaluate": "talik.evaluation",
    "explain": "talik.diagnose.explanation",
    "export": "talik.exporting.whole",
    "freeze": "talik.model.freeze",
    "inspect_model": "talik.model.inspection",
    "preview": "talik.data.dataset",
    "read_data": "talik.data.dataset",
    "resume": "talik.run",
    "train": "talik.run",
    "verify_chain": "talik.model.chain.verify",
}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'talik' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
