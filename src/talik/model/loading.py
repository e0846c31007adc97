"""A model folder as one whole model in memory, loaded by Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from talik.base.errors import SourceError


def load_model(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The causal LM in a local folder, as Transformers loads it, in eval mode. No remote code, no pickle."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # Transformers would fill them with random numbers
        shown = ", ".join(missing[:5])
        raise SourceError(f"the weights lack {len(missing)} tensors: {shown}", where=folder)
    return model.to(torch.device(device)).eval()
