"""Hollow models: built from the config, with parameters that have no storage.

Non-persistent buffers (such as rotary tables), which no checkpoint holds, are computed. Weights are loaded
later, block by block.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation


def hollow_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Builds the causal LM of a local folder in eval mode, with parameters and persistent buffers on `meta`.

    Everything else is equal to `from_pretrained(folder, dtype=dtype)`: dtypes (including parts that the
    model's class keeps in fp32) and buffers.

    Args:
        folder: The folder of the model.
        dtype: The dtype of the parameters.
        device: The device of the buffers.
        config: The config, if it has been read already.
    """
    if config is None:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to("meta")  # some parameters are drawn from a distribution, which ignores the context
    model.config.name_or_path = str(folder)
    _keep_in_fp32(model, dtype)
    _make_buffers(model, torch.device(device))
    return model.eval()


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Sets the dtype of tensors that the model's class keeps in fp32."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    wanted, _, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if wanted.search(name):
            tensor.data = tensor.data.float()


def _make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fills the non-persistent buffers by the model's own code, as Transformers does after loading."""
    for _, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    for module in model.modules():
        module._is_hf_initialized = False  # pyright: ignore[reportArgumentType]
        for name in module._non_persistent_buffers_set & module._buffers.keys():
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
    for module in model.modules():
        for name in module._non_persistent_buffers_set & module._buffers.keys():
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = buffer.to(device)
