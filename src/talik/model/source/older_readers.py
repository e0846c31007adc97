"""config.json and tokenizer_config.json that Transformers 4, and software built on it, also reads.

Transformers 5 moved the rotary embedding's numbers into `rope_parameters`, renamed `torch_dtype`, and has new
tokenizer classes. Readers that do not know these use their defaults (a base of 10,000) without a warning, so
the former keys are written in addition.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from talik.base.files import read_json, write_json

Fields = dict[str, Any]

# By model_type: other former names of rope_theta and partial_rotary_factor.
_FLAT: dict[str, tuple[str, str]] = dict.fromkeys(
    ("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct")
)
# By model_type: the former names of the base of full attention and that of sliding attention.
_BY_LAYER_TYPE = {
    **dict.fromkeys(
        ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), ("rope_theta", "rope_local_base_freq")
    ),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), ("global_rope_theta", "local_rope_theta")),
}
_PHI = ("phi3", "phi4_multimodal")
_APART = {"rope_theta", "partial_rotary_factor"}  # rope values with a key of their own
# Classes that Transformers 4 does not have; each loads tokenizer.json.
_NEW_TOKENIZERS = {
    *("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend"),
    "Qwen3_5Tokenizer",
}


def older_config(fields: Fields) -> Fields:
    """config.json with the keys of Transformers 4 in addition to those of Transformers 5.

    Returned unchanged if the installed Transformers would read a different model from the result.
    """
    made = _floats(fields)
    for part in parts_of_config(made):
        kind = part.get("model_type", "")
        if isinstance(rope := part.get("rope_parameters"), dict):
            for key, value in _older_rope(kind, rope).items():
                part.setdefault(key, value)
        if isinstance(part.get("dtype"), str):
            part.setdefault("torch_dtype", part["dtype"])
    return made if same_config(made, fields) else fields


def parts_of_config(fields: Fields) -> list[Fields]:
    """The fields of config.json and of the configs nested in it (text_config), at any depth."""
    inner = [v for k, v in fields.items() if k.endswith("_config") and isinstance(v, dict)]
    return [fields, *(part for own in inner for part in parts_of_config(own))]


def same_config(one: Fields, other: Fields | PreTrainedConfig) -> bool:
    """True if the installed Transformers reads the same model from both, in any dtype."""
    found = (config if isinstance(config, PreTrainedConfig) else _read(config) for config in (one, other))
    return len({repr(_plain(config.to_dict())) for config in found}) == 1


def older_tokenizer(fields: Fields, *, fast: bool) -> Fields:
    """tokenizer_config.json for Transformers 4; `fast`: there is a tokenizer.json."""
    made = dict(fields)
    if fast and made.get("tokenizer_class") in _NEW_TOKENIZERS:
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(made.get("extra_special_tokens"), list):  # there it is a dict of names
        made["additional_special_tokens"] = made.pop("extra_special_tokens")
    return made


def rewrite(folder: Path) -> None:
    """Rewrites both files of a folder saved by Transformers 5 for older readers."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    write_json(config, older_config(read_json(config)))
    fast = (folder / "tokenizer.json").is_file()
    write_json(tokenizer, older_tokenizer(read_json(tokenizer), fast=fast))


def _floats(value: Any) -> Any:
    """A copy with infinity as the number that Transformers 4 writes, not as an object."""
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if not isinstance(value, dict):
        return value
    special = value.get("__float__") if len(value) == 1 else None
    return {key: _floats(item) for key, item in value.items()} if special is None else float(special)


def _older_rope(kind: str, rope: Fields) -> Fields:
    """The former keys for `rope_parameters`, of one rope or of one per type of layer."""
    nested = {key: value for key, value in rope.items() if isinstance(value, dict)}
    if not nested or "rope_theta" in rope:
        base, share = _FLAT.get(kind, ("rope_theta", "partial_rotary_factor"))
        found = {base: rope.get("rope_theta"), share: rope.get("partial_rotary_factor")}
        return {k: v for k, v in {**found, **_scaling(kind, rope)}.items() if v is not None}
    full, sliding = nested.get("full_attention", {}), nested.get("sliding_attention", {})
    bases = [part.get("rope_theta") for part in (full, sliding)]
    if None in bases or (kind not in _BY_LAYER_TYPE and bases[0] != bases[1]):
        return {}  # Transformers 4 has no such model
    names = _BY_LAYER_TYPE.get(kind, ("rope_theta", "rope_theta"))
    return {**dict(zip(names, bases, strict=True)), **_scaling(kind, full)}


def _scaling(kind: str, rope: Fields) -> Fields:
    """`rope_scaling`, and the original maximum length if it had a key of its own."""
    name = rope.get("rope_type", rope.get("type", "default"))
    if name == "default":
        return {}
    if kind in _PHI and name == "longrope":  # exactly these are allowed there
        scaling = {"type": name, **{k: rope[k] for k in ("short_factor", "long_factor") if k in rope}}
    else:
        scaling = {"rope_type": name, "type": name, **{k: v for k, v in rope.items() if k not in _APART}}
    length = rope.get("original_max_position_embeddings") if name == "longrope" else None
    return {"rope_scaling": scaling} | ({"original_max_position_embeddings": length} if length else {})


def _read(fields: Fields) -> PreTrainedConfig:
    with TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", fields)
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def _plain(value: Any) -> Any:
    """A config's values without those that do not affect the model, with one name for the rope type."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    drop = {"auto_map", "_name_or_path", "dtype", "torch_dtype", "transformers_version"}
    drop |= {"type"} if "rope_type" in value else set()
    if isinstance(rope := value.get("rope_parameters"), dict):  # a rope value given twice
        drop |= {key for key in value.keys() & rope.keys() if value[key] == rope[key]}
    return {key: _plain(value[key]) for key in sorted(value, key=str) if key not in drop}
