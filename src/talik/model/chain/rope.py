"""Rotary tables that depend on the longest sequence of a batch, and so on the other examples in it.

The rope types "dynamic" and "longrope" of Transformers choose frequencies by the length of the whole batch;
"dynamic" also remembers the longest one so far (modeling_rope_utils.dynamic_rope_update).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def forget_lengths(model: nn.Module) -> None:
    """Resets rotary tables to those of a model that has never run."""
    for module, prefix, kind, _ in _ropes(model):
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if "dynamic" not in kind or original is None:
            continue
        here = getattr(module, f"{prefix}inv_freq").device
        module.register_buffer(f"{prefix}inv_freq", original.to(here), persistent=False)
        for name in ("max_seq_len_cached", f"{prefix}max_seq_len_cached"):
            if name in vars(module):
                setattr(module, name, module.original_max_seq_len)


def rope_group(model: nn.Module, length: int) -> tuple[int, ...]:
    """The effect of an example's length on rotary tables: only examples with equal values may share a padded
    batch.

    Empty for most models. For each table that depends on the length: "longrope": which of its two sets is
    used; "dynamic": the length, if it exceeds the original maximum length.
    """
    found = []
    for _, _, kind, limit in _ropes(model):
        if "dynamic" in kind:
            found.append(length if length > limit else 0)
        elif kind in ("longrope", "su"):
            found.append(int(length > limit))
    return tuple(found)


def _ropes(model: nn.Module) -> Iterator[tuple[Any, str, str, int]]:
    """Every rotary table: its module, the prefix of its attributes, its type, its original maximum length."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if not hasattr(module, "max_seq_len_cached") or config is None:
            continue
        parameters = getattr(config, "rope_parameters", None) or {}
        kinds: Any = getattr(module, "rope_type", None)
        for layer_type in kinds if isinstance(kinds, dict) else [None]:
            its = parameters.get(layer_type, {}) if layer_type else parameters
            kind = str((its or {}).get("rope_type", "default"))
            first = (its or {}).get("original_max_position_embeddings")
            limit = first if first and kind != "dynamic" else getattr(config, "max_position_embeddings", 0)
            yield module, f"{layer_type}_" if layer_type else "", kind, int(limit or 0)
