"""Loads a model folder as one whole model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from talik.base.errors import SourceError


def load_model(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Loads the causal LM of a local folder in eval mode, without remote code and without pickle files."""
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
