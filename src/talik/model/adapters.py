"""Adapters of PEFT on the layers of a model: without storage at first, allocated before anything runs.

An adapted linear layer is a layer of PEFT that holds the original one as `base_layer`. The rest of Talik
knows the model's tensors by the names they have without adapters (`base_tensors`).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from talik.base.errors import UsageError
from talik.model.anatomy import parts_of
from talik.recipe.lora import Lora

NAME = "default"  # PEFT's name of the only adapter of a model


def add_adapters(model: PreTrainedModel, lora: Lora, layers: Collection[int]) -> None:
    """Puts adapters without storage on linear layers of the given layers; only they are trained.

    Raises:
        UsageError: PEFT is not installed, a target does not exist, or PEFT cannot adapt it.
    """
    peft = _peft()
    try:
        config = adapter_config(model, lora, layers)
        peft.inject_adapter_in_model(config, model, adapter_name=NAME, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UsageError(f"lora: {error}", remedy="Name others with targets=.") from error
    model.eval()  # PEFT creates modules in training mode
    for module in adapted(model).values():
        for owner, name, weight in _weights(module):
            hollow = torch.empty_like(weight, dtype=module.base_layer.weight.dtype, device="meta")
            owner._parameters[name] = nn.Parameter(hollow)


def fill_adapters(model: nn.Module, seed: int, device: torch.device) -> None:
    """Allocates adapters with PEFT's initial values: A random by the seed, B zero; drawn in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in adapted(model).values():
            dtypes = [weight.dtype for _, _, weight in _weights(module)]
            for owner, name, weight in _weights(module):  # magnitudes stay 1 until `measure_lengths`
                owner._parameters[name] = nn.Parameter(torch.ones(weight.shape, device="cpu"))
            module.reset_lora_parameters(NAME, True)
            for (owner, name, weight), dtype in zip(_weights(module), dtypes, strict=True):
                owner._parameters[name] = nn.Parameter(weight.detach().to(device, dtype))


def empty_adapters(model: nn.Module) -> None:
    """Moves adapters back to the meta device."""
    for module in adapted(model).values():
        for owner, name, weight in _weights(module):
            owner._parameters[name] = nn.Parameter(torch.empty_like(weight, device="meta"))


def has_lengths(layer: nn.Module) -> bool:
    """True if the adapters of this layer are DoRA, whose magnitudes are initialised from the weights."""
    return any(NAME in module.lora_magnitude_vector for module in adapted(layer).values())


def measure_lengths(layer: nn.Module) -> None:
    """DoRA: initialises the trained magnitudes with the norms of the loaded weights, as PEFT does."""
    for module in adapted(layer).values():
        if NAME in module.lora_magnitude_vector:
            module.lora_magnitude_vector[NAME].update_layer(
                base_layer=module.base_layer,
                lora_A=module.lora_A[NAME].weight,
                lora_B=module.lora_B[NAME].weight,
                scaling=module.scaling[NAME],
            )


@torch.no_grad()
def merge_adapters(layer: nn.Module) -> None:
    """Adds adapters to the loaded weights in place, as PEFT does."""
    for module in adapted(layer).values():
        module.merge()


def unmerged(layer: nn.Module) -> None:
    """Marks adapters as not merged, because the merged weights have been unloaded."""
    for module in adapted(layer).values():
        module.merged_adapters.clear()


def write_adapter_folder(model: PreTrainedModel, weights: Path, folder: Path, base: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors for PEFT.

    Args:
        model: The model with adapters.
        weights: A safetensors file of the adapters' parameters, by the model's names.
        folder: Where to write.
        base: The name of the base model.
    """
    config: Any = model.peft_config[NAME]  # pyright: ignore[reportIndexIssue]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    named = _peft().get_peft_model_state_dict(
        model, state_dict=load_file(weights), adapter_name=NAME, save_embedding_layers=False
    )
    tensors = {f"base_model.model.{name}": tensor for name, tensor in named.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def load_adapter_folder(model: PreTrainedModel, folder: Path) -> Any:
    """The model with the adapters of a folder, as PEFT loads it, in the dtype of their training."""
    with warnings.catch_warnings():  # PEFT uses a deprecated name of Transformers
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return _peft().PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


def adapted(module: nn.Module) -> dict[str, Any]:
    """The linear layers with adapters, by their names without adapters."""
    return {
        name: found
        for name, found in module.named_modules()
        if hasattr(found, "base_layer") and isinstance(getattr(found, "lora_A", None), nn.ModuleDict)
    }


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters and persistent buffers, by their names without adapters."""
    with_adapters, found = adapted(model), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, base, own = name.partition(".base_layer.")
        if base and owner in with_adapters:
            found[f"{owner}.{own}"] = tensor
        elif name.rsplit(".", 3)[0] not in with_adapters:  # else: q_proj.lora_A.default.weight
            found[name] = tensor
    return found


def adapter_weights(model: nn.Module) -> list[Tensor]:
    """The parameters of all adapters."""
    return [weight for module in adapted(model).values() for _, _, weight in _weights(module)]


def idle_adapters(model: nn.Module) -> list[str]:
    """The kinds of linear layers whose adapters got no gradient: their B is still zero."""
    idle = [name for name, module in adapted(model).items() if not module.lora_B[NAME].weight.any()]
    return list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in idle))


def in_words(model: PreTrainedModel) -> str:
    """Which linear layers have adapters, and which matrices of the same layers stay frozen."""
    parts, of_layer = parts_of(model), adapted(model)
    layers = {parts.part(f"{name}.weight") for name in of_layer}
    with_adapters = {f"{name}.weight" for name in of_layer}
    rest = [
        name
        for name, tensor in base_tensors(model).items()
        if parts.part(name) in layers and tensor.dim() > 1 and name not in with_adapters
    ]
    own = re.compile(rf"{re.escape(parts.layers)}\.\d+\.")
    shown, left = (dict.fromkeys(own.sub("", name) for name in names) for names in (of_layer, rest))
    frozen = f"; {', '.join(left)} there have none" if left else ""
    return f"adapters on {', '.join(shown)}{frozen}"


def adapter_config(model: PreTrainedModel, lora: Lora, layers: Collection[int]) -> Any:
    """The LoraConfig of PEFT that matches exactly these linear layers, as short as possible."""
    names = _targets(model, lora, layers)
    pattern = parts_of(model).layers.rpartition(".")[2]
    config = _peft().LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha)
        if lora.alpha.is_integer()
        else lora.alpha,  # other readers expect an integer
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=names,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    names = _that_peft_leaves(config, model, names, every=not lora.targets)
    short = sorted({name.rpartition(".")[2] for name in names})
    place = re.compile(rf"(?:.*?\.)?{pattern}\.(\d+)\.(?:.*\.)?({'|'.join(map(re.escape, short))})")
    meant = [
        name for name, _ in model.named_modules() if (m := place.fullmatch(name)) and int(m[1]) in layers
    ]
    whole = {"layers_to_transform": None, "layers_pattern": None, "target_modules": set(names)}
    brief = {"layers_to_transform": sorted(layers), "layers_pattern": [pattern], "target_modules": set(short)}
    for name, value in (brief if set(meant) == set(names) else whole).items():
        setattr(config, name, value)
    return config


def _targets(model: PreTrainedModel, lora: Lora, layers: Collection[int]) -> list[str]:
    """The full names of the wanted linear layers."""
    prefix = parts_of(model).layers
    linear = [
        f"{prefix}.{layer}.{name}"
        for layer in sorted(layers)
        for name, module in model.get_submodule(f"{prefix}.{layer}").named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    there = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
    absent = [t for t in lora.targets if not any(name.endswith(f".{t}") for name in linear)]
    if absent or not linear:
        wanted = " or ".join(absent) or "at all"
        problem = f"lora: no linear layer {wanted} in the layers that are trained"
        raise UsageError(problem, remedy=f"There are {there}.")
    if not lora.targets:
        return linear
    return [name for name in linear if name.endswith(tuple(f".{target}" for target in lora.targets))]


def _that_peft_leaves(config: Any, model: PreTrainedModel, names: list[str], *, every: bool) -> list[str]:
    """The names that PEFT does not treat as mixture-of-experts weights, which Transformers 5 stacks.

    Raises:
        UsageError: One of the others was asked for by name.
    """
    conversion = _peft("peft.utils.transformers_weight_conversion")
    tried = copy.deepcopy(config)
    conversion.convert_peft_config_for_transformers(tried, model, None)
    left = [name for name in names if name in tried.target_modules]
    if not left or (len(left) < len(names) and not every):
        taken = ", ".join(sorted({n.rpartition(".")[2] for n in names if n not in left}))
        raise UsageError(f"lora: PEFT takes {taken} of {type(model).__name__} for its experts")
    return left


def _weights(module: Any) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The parameters of one adapter, each with its module and its name there."""
    for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
        held = getattr(module, kind)
        if NAME in held:
            for name, weight in list(held[NAME]._parameters.items()):
                if weight is not None:
                    yield held[NAME], name, weight


def _peft(module: str = "peft") -> ModuleType:
    """PEFT or one of its modules, imported only if adapters are asked for."""
    try:
        return import_module(module)
    except ImportError as error:
        remedy = 'Install it: pip install "talik[peft]"'
        raise UsageError(f"adapters need PEFT: {error}", remedy=remedy) from error
