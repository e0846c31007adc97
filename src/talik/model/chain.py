"""A model as a chain of blocks, each run by the model's own code, and whether that is exact.

Only the files model/chain*.py know how Transformers models are built. chain_blocks.py: the chain itself;
chain_facts.py and chain_probe.py: what it must know of a model, and how that is found; chain_forms.py: what
layers hand on; chain_rope.py: rotary tables that depend on lengths; chain_verify.py: the check.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from talik.errors import SourceError
from talik.model.chain_blocks import Call as Call
from talik.model.chain_blocks import Chain as Chain
from talik.model.chain_blocks import Skeleton as Skeleton
from talik.model.chain_blocks import first_trained_layer as first_trained_layer
from talik.model.chain_blocks import run_layers as run_layers
from talik.model.chain_verify import verify_chain as verify_chain
from talik.model.chain_verify import verify_layers as verify_layers


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
