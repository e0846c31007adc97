"""config.json of an export: the source's own file with the few values that training has changed.

Readers older than Transformers 5 look for `rope_theta`, `rope_scaling` and `torch_dtype` where models have
had them for years. A file in the newer style gets these too, so that every reader has the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from talik.errors import TalikError
from talik.files import read_json

_OWN_FILE = (
    "dtype",
    "tie_word_embeddings",
    "architectures",
    "transformers_version",
    "_name_or_path",
    "torch_dtype",
)


def exported_config(source: Path, dtype: torch.dtype, *, untied: bool) -> dict[str, Any]:
    """The fields of an export's config.json.

    Args:
        source: The folder of the model that was trained.
        dtype: The dtype of the export's tensors.
        untied: Whether the head has weights of its own now.
    """
    config: dict[str, Any] = read_json(source / "config.json")
    config.pop("auto_map", None)  # the code that it names is not in the export
    parts = [
        config,
        *(
            config[name]
            for name in ("text_config", "language_config", "llm_config")
            if _is_part(config, name)
        ),
    ]
    name = str(dtype).removeprefix("torch.")
    config["torch_dtype"] = name
    for part in parts:
        part |= {key: name for key in ("dtype", "torch_dtype") if key in part}
        part |= _older_rope(part)
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return config


def _is_part(config: dict[str, Any], name: str) -> bool:
    return isinstance(config.get(name), dict)


def _older_rope(part: dict[str, Any]) -> dict[str, Any]:
    """The rotary base and scaling as readers before Transformers 5 look for them; {} if they are there."""
    rope = part.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in part:
        return {}
    if "full_attention" in rope or "sliding_attention" in rope:
        return _older_rope_of_two(rope)
    return _scaled(rope)


def _older_rope_of_two(rope: dict[str, Any]) -> dict[str, Any]:
    """Of a model whose layers with a window have a base of their own."""
    made = _scaled(rope.get("full_attention") or {})
    if "rope_scaling" in made:
        made["rope_scaling"].pop("rope_theta", None)
    local = (rope.get("sliding_attention") or {}).get("rope_theta")
    return made if local is None else {**made, "rope_local_base_freq": local}


def _scaled(rope: dict[str, Any]) -> dict[str, Any]:
    """Base, part of the head, scaling. Transformers 5 takes `rope_scaling` in place of `rope_parameters`."""
    made = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return made
    if kind == "longrope":  # Phi 3 accepts these fields and no others
        return {
            **made,
            "rope_scaling": {"type": kind, **{key: rope[key] for key in ("short_factor", "long_factor")}},
        }
    return {**made, "rope_scaling": dict(rope)}


def check_config(source: Path, out: Path) -> None:
    """Checks that Transformers reads the exported config as it reads the source's.

    Raises:
        TalikError: A field differs that training does not change.
    """
    before, after = (
        _fields(AutoConfig.from_pretrained(folder, local_files_only=True)) for folder in (source, out)
    )
    if different := sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    ):
        problem = f"the exported config.json would be read with other values: {', '.join(different)}"
        raise TalikError(problem, where=out)


def _fields(config: Any) -> dict[str, Any]:
    """The fields of a config that training does not change, in one form."""

    def without(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: without(inner) for key, inner in value.items() if key not in (*_OWN_FILE, "auto_map")}

    fields = without(config.to_dict())
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        rope = part.get("rope_parameters")
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "longrope":
            defaults = {"partial_rotary_factor": 1.0} | {
                key: part[key] for key in ("original_max_position_embeddings",) if part.get(key) is not None
            }
            part["rope_parameters"] = defaults | {key: rope[key] for key in rope if key != "type"}
        if part.get("partial_rotary_factor") == 1.0:
            del part["partial_rotary_factor"]
    return fields
