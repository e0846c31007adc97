"""Describes the config and the sizes of a model in words. No weights are read.

    print(inspection_text(inspect_model("Qwen/Qwen2.5-7B-Instruct")))

Every number comes from config.json and from the model built from it on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talik.base.errors import SourceError, UsageError
from talik.base.files import format_bytes
from talik.model.anatomy import Anatomy, anatomy_of
from talik.model.source.source import find_model

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Inspection:
    """The anatomy of a model, a sentence for each fact, and what training its last layers would train.

    Attributes:
        top: Parameters of the final norm and the last `top_layers` layers.
        first: The lowest of these layers.
    """

    model: str
    anatomy: Anatomy
    sentences: dict[str, str]
    top_layers: int
    first: int
    top: int

    def as_dict(self) -> dict[str, Any]:
        """All values, for JSON."""
        own, size = self.anatomy, self.anatomy.item_bytes
        return {
            "model": self.model,
            "model_type": own.model_type,
            "architecture": own.architecture,
            "facts": own.facts,
            "sentences": self.sentences,
            "parameters": own.parameters,
            "bytes": own.bytes,
            "tied": own.tied,
            "parts": {
                part: {"parameters": count, "bytes": count * size} for part, count in own.parts.items()
            },
            "top": {
                "layers": [self.first, len(own.layers) - 1],
                "parameters": self.top,
                "share": self.top / own.parameters,
                "bytes": self.top * size,
            },
        }


def inspect_model(
    model: str, *, top_layers: int | None = None, revision: str | None = None, offline: bool = False
) -> Inspection:
    """Describes a model by its config.json, and what training its last layers would train.

    Args:
        model: A folder, a config.json, a hub id or a GGUF file.
        top_layers: How many of the last layers; 5 by default.
        revision: Branch, tag or commit of a hub model.
        offline: Use only files that have been downloaded.

    Raises:
        SourceError: The model is not found or not supported.
        UsageError: The model has fewer layers.
    """
    source = find_model(model, revision=revision, weights=False, offline=offline)
    anatomy = anatomy_of(_without_storage(source.folder))
    count = len(anatomy.layers)
    top_layers = min(5, count) if top_layers is None else top_layers
    if not 1 <= top_layers <= count:
        remedy = f"Name a number from 1 to {count}."
        raise UsageError(
            f"{top_layers} top layers of a model with {count} layers", where=model, remedy=remedy
        )
    top = sum(anatomy.layers[count - top_layers :]) + anatomy.parts["norm"]
    sentences = {name: _sentence(anatomy, name) for name in anatomy.facts}
    return Inspection(model, anatomy, sentences, top_layers, count - top_layers, top)


def _without_storage(folder: Path) -> torch.nn.Module:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # constructors raise errors of many types for inconsistent values
        problem = f"Transformers cannot build it: {type(error).__name__}: {error}"
        raise SourceError(problem, where=folder / "config.json") from error


# The meaning of each fact, for readers who meet it for the first time


def _intermediate(own: Anatomy, size: int) -> str:
    hidden = own.facts["hidden_size"]
    times = f", {size / hidden:.1f} times hidden_size" if isinstance(hidden, int) else ""
    return f"inside a layer's MLP every token is {size:,} numbers{times}."


def _key_value_heads(own: Anatomy, count: int) -> str:
    heads = own.facts["num_attention_heads"]
    if not isinstance(heads, int) or heads % count:
        return f"keys and values have {count} heads."
    if heads == count:
        return f"each of the {heads} query heads has a key/value head of its own."
    times, plural = heads // count, "s" if count > 1 else ""
    shared = f"{heads} query heads share {count} key/value head{plural}, {times} to 1"
    return f"{shared}, so keys and values take 1/{times} of the memory."


def _tied(own: Anatomy, tied: bool) -> str:
    if tied:
        return "the head is the embedding matrix itself, so that training one trains the other."
    return "the embeddings and the head are two matrices; training one leaves the other as it is."


_SENTENCES: dict[str, Callable[[Anatomy, Any], str]] = {
    "vocab_size": lambda own, size: (
        f"the model knows {size:,} tokens, and answers each position with as many scores "
        f"({format_bytes(4 * size)} in float32)."
    ),
    "hidden_size": lambda own, size: (
        f"between layers every token is {size:,} numbers ({format_bytes(size * own.item_bytes)})."
    ),
    "intermediate_size": _intermediate,
    "num_attention_heads": lambda own, count: (
        f"attention looks at the text in {count} ways, its query heads."
    ),
    "num_key_value_heads": _key_value_heads,
    "num_hidden_layers": lambda own, count: f"layers 0 to {count - 1} run one after the other.",
    "tie_word_embeddings": _tied,
    "dtype": lambda own, _: (
        f"a number takes {own.item_bytes} bytes, the whole model {format_bytes(own.bytes)}."
    ),
    "max_position_embeddings": lambda own, count: f"a text can have up to {count:,} tokens, answer included.",
}


def _sentence(own: Anatomy, name: str) -> str:
    value = own.facts[name]
    if value is None:
        nothing = "; sizes below are counted as float32" if name == "dtype" else ""
        return f"the config of {own.model_type} has none{nothing}."
    if isinstance(value, list | tuple | dict):
        return "differs from layer to layer."
    return _SENTENCES[name](own, value)


def inspection_text(inspection: Inspection) -> str:
    """An inspection as text for a terminal."""
    own = inspection.anatomy
    lines = [f"{inspection.model}: {own.model_type}, run by Transformers' {own.architecture}", ""]
    for name, sentence in inspection.sentences.items():
        value = own.facts[name]
        lines.append(f"{name} {'-' if value is None else value}: {sentence}")
    lines += ["", *_table(own), "", _top_words(inspection)]
    return "\n".join(lines)


def _table(own: Anatomy) -> list[str]:
    sizes = own.layers
    each = f"{len(sizes)} layers" if len(set(sizes)) > 1 else f"{len(sizes)} layers of {sizes[0]:,}"
    rows = [("embeddings", own.parts["embeddings"]), (each, sum(sizes)), ("norm", own.parts["norm"])]
    rows += [("head, tied" if own.tied else "head", own.parts["head"]), ("other", own.parts["other"])]
    rows = [row for row in rows if row[1] or row[0] != "other"] + [("all", own.parameters)]
    width = max(len(name) for name, _ in rows)
    line = "{:{}}  {:>17,}  {:>6.1%}  {:>10}".format
    return [line(name, width, n, n / own.parameters, format_bytes(n * own.item_bytes)) for name, n in rows]


def _top_words(inspection: Inspection) -> str:
    own, last = inspection.anatomy, len(inspection.anatomy.layers) - 1
    which = f"layer {last}" if inspection.first == last else f"layers {inspection.first}..{last}"
    share, size = inspection.top / own.parameters, format_bytes(inspection.top * own.item_bytes)
    return (
        f"Training the last {inspection.top_layers} would train {which} and the final norm: "
        f"{inspection.top:,} parameters, {share:.1%} of the model, {size}."
    )
