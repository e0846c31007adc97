"""A model without its weights: everything that its config decides, parameters without storage.

What no checkpoint holds (rotary tables and other non-persistent buffers) is there; the weights come block by
block from a store.
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
    """The causal LM in a local folder, in eval mode, its parameters and persistent buffers on `meta`.

    Everything else is as `from_pretrained(folder, dtype=dtype)` makes it: the same dtypes (parts that the
    model's class keeps in fp32 included), the same buffers.
    """
    if config is None:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to("meta")  # a few are drawn from a distribution, which the context does not see
    model.config.name_or_path = str(folder)
    _keep_in_fp32(model, dtype)
    _make_buffers(model, torch.device(device))
    return model.eval()


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives the tensors that the model's class wants in another dtype than the rest theirs."""
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
