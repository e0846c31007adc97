"""Whether weights read block by block are those that Transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from talik.model.anatomy import parts_of
from talik.model.block import EMBEDDINGS, REST, TAIL, Block
from talik.model.weights.hollow import hollow_model
from talik.model.weights.weights import Weights


def read_all(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Every tensor, block by block."""
    weights, found = Weights(model, folder), {}
    for block in (EMBEDDINGS, *map(Block.layer, range(parts_of(model).count)), TAIL, REST):
        names = weights.names(block)
        found |= weights.read(names, torch.empty(weights.size(names), dtype=torch.uint8))
    return found


def loaded_differently(folder: Path, dtype: torch.dtype) -> list[str]:
    """The tensors and buffers that are not, bit for bit, what `from_pretrained` loads."""
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = hollow_model(folder, dtype)
    found = read_all(model, folder)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in found}
    wanted = expected.state_dict() | dict(expected.named_buffers())
    ours = buffers | found
    wrong = sorted(wanted.keys() ^ ours.keys())
    wrong += [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    for name in wanted.keys() & ours.keys():
        same = ours[name].dtype == wanted[name].dtype and ours[name].device == wanted[name].device
        if not same or not torch.equal(ours[name], wanted[name]):
            wrong.append(name)
    return wrong
