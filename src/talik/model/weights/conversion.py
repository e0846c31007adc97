"""Maps tensors of a checkpoint to tensors of a model, by Transformers' own conversion mapping.

Most only have another name; some are merged or split (experts, fused projections). Names, patterns and
operations are those of `transformers.conversion_mapping` and `core_model_loading`.
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
    """Tensors of a model and the checkpoint tensors they are made of: one unchanged, or several converted.

    Attributes:
        sources: Names in the checkpoint, in the order of the conversion, each with the pattern that it
            matched.
        targets: Names in the model with their shapes.
    """

    sources: tuple[tuple[str, str | None], ...]
    targets: dict[str, torch.Size]
    converter: WeightConverter | None
    first: str

    def convert(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Converts tensors of the checkpoint to tensors of the model."""
        if self.converter is None:
            return {self.first: tensors[self.sources[0][0]]}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, lambda tensor=tensors[name]: tensor)  # pyright: ignore
        made: dict[str, Any] = converter.convert(self.first, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


def pieces_of(model: PreTrainedModel, table: Mapping[str, Entry]) -> list[Piece]:
    """The pieces of a model's tensors (parameters and persistent buffers) for a checkpoint with this table.

    Tensors that the model does not use are left out, as in Transformers.

    Raises:
        SourceError: A shape is not that of the model.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted = base_tensors(model)
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(table, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:  # the name must not be changed
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
    """The piece with its targets, found by converting tensors without storage."""
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
    """The inverse conversion: tensors with the names and shapes of the model's checkpoints."""
    return dict(revert_weight_conversion(model, dict(tensors)))


def in_checkpoint(
    model: PreTrainedModel, trained: dict[str, Tensor], known: set[str], source: Path
) -> dict[str, Tensor]:
    """The trained tensors with the names in the checkpoint, in the dtypes of their training.

    Checkpoints saved from the bare model (GPT-2, Bloom) lack its prefix. A tied matrix is written under each
    of its names that the checkpoint has; different values would be loaded as two matrices.
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
    """True if two tensors of a checkpoint have the same bytes; otherwise they were separate during the
    run.
    """
    digests = tensor_digests(source)
    return digests[one] == digests[other]
