"""Names of TrainingArguments in Transformers that a recipe accepts, or explains.

https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALIASES = {  # name in Transformers: field of the recipe with the same meaning
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "epsilon",
    "max_grad_norm": "clip",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "early_stopping_patience": "early_stop",
    "max_seq_length": "max_length",
}
_TOKENS = (
    "a step is counted in tokens here: set batch_tokens to the number of examples in a step times their mean "
    "length in tokens"
)
EXPLAINED = {  # name in Transformers: why there is no such field, and what to do
    "per_device_train_batch_size": _TOKENS,
    "gradient_accumulation_steps": f"the plan chooses the micro-batches; {_TOKENS}",
    "gradient_checkpointing": "the plan decides whether layers are recomputed: leave it out",
    "bf16": "name the precision: bf16 (default), bf16-sr or fp32",
    "fp16": "name the precision: bf16 (default), bf16-sr or fp32",
    "optim": "name the optimizer: adamw, adamw-8bit, adafactor, muon or sgd",
    "warmup_steps": "warmup is the share of the steps in which the learning rate rises",
    "output_dir": "the run folder is named by -o",
}


def own_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with the recipe's own names; a field that is given under both names keeps both."""
    return {
        name if ALIASES.get(name) in given else ALIASES.get(name, name): value
        for name, value in given.items()
    }


def why_unknown(name: str) -> str:
    """Why a recipe has no such field, and what to do."""
    if name in EXPLAINED:
        return EXPLAINED[name]
    if name in ALIASES:
        return f"the same field as {ALIASES[name]}: name one"
    return "there is no such field"


def options_of(field: str) -> list[str]:
    """Further command-line options of a field, as in --max-grad-norm for clip."""
    return [f"--{name.replace('_', '-')}" for name, own in ALIASES.items() if own == field]
