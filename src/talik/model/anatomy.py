"""Names the parts of a model and counts their parameters; works on the meta device, too.

parts_of(model).part("model.layers.17.mlp.up_proj.weight")     # "layer 17"
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from talik.base.errors import SourceError

if TYPE_CHECKING:
    import torch

FACTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("num_hidden_layers", "tie_word_embeddings", "dtype", "max_position_embeddings"),
)


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the parts of a model are, as dotted names of modules.

    Attributes:
        layers: The list of layers ("model.layers").
        count: The number of layers.
        embedding: The table of the input tokens.
        head: The module that computes the logits; None if there is none.
        tied: Whether head and embeddings share one matrix.
        pieces: The part of every module outside the layers that has parameters of its own.
    """

    layers: str
    count: int
    embedding: str
    head: str | None
    tied: bool
    pieces: dict[str, str]

    def part(self, parameter: str) -> str:
        """The part a parameter belongs to: 'embeddings', 'layer 17', 'norm', 'head', 'other' or 'outside'.

        'outside' is outside the language model, such as a tower for images; text does not pass through it.
        """
        if parameter.startswith(self.layers + "."):
            return f"layer {parameter[len(self.layers) + 1 :].split('.')[0]}"
        steps = parameter.split(".")
        for end in range(len(steps), 0, -1):
            if part := self.pieces.get(".".join(steps[:end])):
                return part
        return "other"

    def names(self, part: str) -> tuple[str, ...]:
        """The modules of 'embeddings', 'norm', 'head' or 'other'."""
        return tuple(name for name, its in self.pieces.items() if its == part)


def parts_of(model: torch.nn.Module) -> Parts:
    """The parts of a causal LM of Transformers, with weights or on the meta device.

    Raises:
        SourceError: The model has no list of layers that Talik recognises.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    layers = _layers_of(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    owners = [
        name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))
    ]
    prefix = names[id(layers)]
    pieces = {
        name: _part_of_piece(model, name, prefix)
        for name in owners
        if not f"{name}.".startswith(f"{prefix}.")
    }
    decoder = names.get(id(getattr(model, "get_decoder", lambda: None)()), "")
    if prefix.startswith(f"{decoder}."):
        outside = [name for name in pieces if not f"{name}.".startswith(f"{decoder}.")]
        pieces |= {name: "outside" for name in outside if pieces[name] != "head"}
    pieces[names[id(embedding)]] = "embeddings"
    if head is not None:
        pieces[names[id(head)]] = "head"
    return Parts(
        layers=prefix,
        count=len(layers),
        embedding=names[id(embedding)],
        head=None if head is None else names[id(head)],
        tied=head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", model),
        pieces=pieces,
    )


def _layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    from torch import nn

    def lists_in(module: nn.Module) -> list[nn.ModuleList]:
        return [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m)]

    decoder = getattr(model, "get_decoder", lambda: None)()  # a tower for images may exist next to it
    lists = lists_in(decoder if decoder is not None else model) or lists_in(model)
    count = getattr(_text_config(model.config), "num_hidden_layers", None)
    exact = [module for module in lists if len(module) == count] or lists
    if not exact:
        raise SourceError(
            f"{type(model).__name__} has no list of layers", remedy="Talik trains models made of layers."
        )
    return max(exact, key=lambda module: sum(weight.numel() for weight in module.parameters()))


def _part_of_piece(model: torch.nn.Module, name: str, layers: str) -> str:
    """The part of a module outside the layers; the model's forward shows whether it runs before them."""
    from torch import nn

    base = getattr(model, "base_model_prefix", "")
    if base and hasattr(model, base) and not f"{name}.".startswith(f"{base}."):
        return "head"
    if isinstance(model.get_submodule(name), nn.Embedding):
        return "embeddings"
    parent, _, own = layers.rpartition(".")
    place = None
    if f"{name}.".startswith(f"{parent}.") and name != parent:
        child = name[len(parent) + 1 :].split(".")[0]
        place = _place(type(model.get_submodule(parent)), child, own)
    if place == "before" or (place is None and "emb" in name.lower()):
        return "embeddings"
    norm = (
        re.search(r"norm|\bln_", name.lower()) or "norm" in type(model.get_submodule(name)).__name__.lower()
    )
    return "norm" if norm else "other"


def _place(parent: type, child: str, layers: str) -> str | None:
    """Where `parent.forward` uses `child`: "before" or "after" the loop over `layers`; None if unknown.

    A method that uses `child` stands for it: Gemma 3n normalises the inputs per layer in a method of its own.
    Hooks on a forward do not give the same for every model (docs/decisions/anatomy-by-source.md).
    """
    try:
        source = inspect.getsource(parent.forward)  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, TypeError):
        return None
    names = "|".join((child, *_methods_with(parent, child)))
    use = re.search(rf"self\.({names})\b", source)
    loop = re.search(rf"\bfor\b[^\n]*self\.{layers}\b", source)
    return None if use is None or loop is None else ("before" if use.start() < loop.start() else "after")


def _methods_with(parent: type, child: str) -> list[str]:
    """Methods of a class, other than forward and __init__, whose code uses `self.child`."""
    own = ((name, value) for name, value in vars(parent).items() if inspect.isfunction(value))
    methods = ((name, value) for name, value in own if name not in ("forward", "__init__"))
    return [name for name, value in methods if re.search(rf"self\.{child}\b", inspect.getsource(value))]


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The facts of a config.json and the parameters of a model's parts.

    Attributes:
        facts: Values of the config; None if it has no such field.
        parts: Parameters by part, in the order they run: embeddings, layer 0, ..., norm, head, other. A tied
            head counts as embeddings.
        item_bytes: Bytes of a number in the config's dtype, else of float32.
    """

    model_type: str
    architecture: str
    facts: dict[str, Any]
    parts: dict[str, int]
    tied: bool
    item_bytes: int

    @property
    def parameters(self) -> int:
        """The number of all parameters."""
        return sum(self.parts.values())

    @property
    def bytes(self) -> int:
        """Bytes of all parameters."""
        return self.parameters * self.item_bytes

    @property
    def layers(self) -> tuple[int, ...]:
        """The parameters of each layer."""
        return tuple(count for part, count in self.parts.items() if part.startswith("layer "))


def anatomy_of(model: torch.nn.Module) -> Anatomy:
    """The anatomy of a model, with weights or on the meta device."""
    import torch

    parts, config = parts_of(model), _text_config(model.config)
    counts = {
        "embeddings": 0,
        **{f"layer {i}": 0 for i in range(parts.count)},
        "norm": 0,
        "head": 0,
        "other": 0,
    }
    for name, weight in model.named_parameters():
        part = parts.part(name)
        counts["other" if part == "outside" else part] += weight.numel()
    facts = {name: _value(config, name) for name in FACTS}
    dtype = facts["dtype"] = str(facts["dtype"]).removeprefix("torch.") if facts["dtype"] else None
    return Anatomy(
        model_type=str(model.config.model_type),  # pyright: ignore
        architecture=type(model).__name__,
        facts=facts,
        parts=counts,
        tied=parts.tied,
        item_bytes=getattr(torch, dtype or "float32").itemsize,
    )


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name)  # through the config's attribute_map: n_embd is hidden_size
    except Exception:  # Transformers' class for values per layer is not public
        return None
