"""config.json of an export: the source's own, with the few values that training has changed."""

from __future__ import annotations

import copy
from typing import Any

import torch

from talik.base.errors import TalikError
from talik.base.files import read_json
from talik.model.folder import ModelFolder
from talik.model.source.older_readers import older_config, parts_of_config, same_config


def exported_config(source: ModelFolder, dtype: torch.dtype, *, untied: bool) -> dict[str, Any]:
    """The fields of an export's config.json, with the keys that older readers look for.

    Args:
        source: The model that was trained.
        dtype: The dtype of the export's tensors.
        untied: Whether the head has weights of its own now.

    Raises:
        TalikError: Transformers would read a different model from these fields.
    """
    config = copy.deepcopy(source.config)
    text = config.get_text_config(decoder=True)
    fields: dict[str, Any] = read_json(source.path / "config.json")
    fields.pop("auto_map", None)  # the code it refers to is not exported
    if not {"dtype", "torch_dtype"} & fields.keys():
        fields["torch_dtype"] = ""
    for part in parts_of_config(fields):
        part |= dict.fromkeys({"dtype", "torch_dtype"} & part.keys(), str(dtype).removeprefix("torch."))
    if untied:
        text.tie_word_embeddings = config.tie_word_embeddings = False
        fields["tie_word_embeddings"] = False
        for key, value in fields.items():
            if isinstance(value, dict) and getattr(config, key, None) is text:
                value["tie_word_embeddings"] = False
    fields = older_config(fields)
    if not same_config(fields, config):
        raise TalikError(
            "the exported config.json would not be read as the model that was trained", where=source.path
        )
    return fields
