"""Which tensors of a checkpoint make which tensors of a model, by Transformers' own conversion mapping.

Most are the same under another name; some are merged or split (experts of a mixture, fused projections). The
names, patterns and operations are those of `transformers.conversion_mapping` and `core_model_loading`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from talik.base.errors import SourceError
from talik.model.adapters import base_tensors
from talik.model.weights.digests import tensor_digests
from talik.model.weights.safetensors_file import Entry


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tensors of a model and what they are made of: one tensor as it is, or several converted.

    `sources` holds the names in the checkpoint in the order that the conversion wants, each with the pattern
    that it matched; `targets` the names in the model with their shapes.
    """

    sources: tuple[tuple[str, str | None], ...]
    targets: dict[str, torch.Size]
    converter: WeightConverter | None
    first: str

    def convert(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """The model's tensors, of the checkpoint's."""
        if self.converter is None:
            return {self.first: tensors[self.sources[0][0]]}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, lambda tensor=tensors[name]: tensor)  # pyright: ignore
        made: dict[str, Any] = converter.convert(self.first, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


def pieces_of(model: PreTrainedModel, table: Mapping[str, Entry]) -> list[Piece]:
    """What a checkpoint with this table makes of a model's tensors (parameters and persistent buffers).

    Tensors that the model has no use for are left out, as Transformers does. Raises SourceError for a shape
    that is not the model's.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted = base_tensors(model)
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(table, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:  # a name that should not have been changed
            target, pattern = name, None
        if target in wanted:
            found.setdefault(target, []).append((name, pattern))
    made = []
    for first, sources in found.items():
        pattern = sources[0][1]
        piece = Piece(tuple(sources), {}, of_pattern[pattern] if pattern else None, first)
        made.append(_tried_out(piece, model, table, wanted))
    return made


def _tried_out(
    piece: Piece, model: PreTrainedModel, table: Mapping[str, Entry], wanted: Mapping[str, Tensor]
) -> Piece:
    """The piece with what it makes, found by converting without storage."""
    empty = {
        name: torch.empty(table[name].shape, dtype=table[name].dtype, device="meta")
        for name, _ in piece.sources
    }
    for name, tensor in piece.convert(empty, model).items():
        if name not in wanted:
            continue
        if wanted[name].shape != tensor.shape:
            source = piece.sources[0][0]
            raise SourceError(
                f"{source} makes {name} of shape {list(tensor.shape)}, and the model's is "
                f"{list(wanted[name].shape)}",
                where=table[source].file,
                remedy="The weights are not those of this config.json.",
            )
        piece.targets[name] = tensor.shape
    return piece


def checkpoint_names(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back: tensors under the names, and in the shapes, that the model's checkpoints have."""
    return dict(revert_weight_conversion(model, dict(tensors)))


def in_checkpoint(
    model: PreTrainedModel, trained: dict[str, Tensor], known: set[str], source: Path
) -> dict[str, Tensor]:
    """The trained tensors under the names that the checkpoint uses, in the dtypes they were trained in.

    Checkpoints saved from the bare model (GPT-2's, Bloom's) lack its prefix. A tied matrix goes under each of
    its names that the checkpoint has: two that differ would be loaded as two.
    """
    prefix = f"{model.base_model_prefix}."

    def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            bare if name not in known and (bare := name.removeprefix(prefix)) in known else name: tensor
            for name, tensor in checkpoint_names(model, tensors).items()
        }

    delta = named(trained)
    tied = list(getattr(model, "all_tied_weights_keys", {}).items())
    for one, other in [*tied, *((twin, name) for name, twin in tied)]:
        if one in trained and other not in trained:
            (own,), (twin,) = (named({name: trained[one]}) for name in (one, other))
            if twin in known and (own not in known or _alike(source, own, twin)):
                delta[twin] = trained[one]
                if own not in known:
                    del delta[own]
    return delta


def _alike(source: Path, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint have the same bytes: else they were two while the run went on."""
    digests = tensor_digests(source)
    return digests[one] == digests[other]
