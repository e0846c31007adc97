"""Compares the logits of an export with those of the tuned model, if there is memory for it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from talik.base.errors import TalikError
from talik.base.files import format_bytes
from talik.base.system import free_memory
from talik.machine.device import device_memory
from talik.model.adapters import load_adapter_folder, merge_adapters
from talik.model.loading import load_model
from talik.model.tokenizer import load_tokenizer
from talik.training.loading import load_whole_model, working_dtype
from talik.training.run.checkpoints import load_weights
from talik.training.run.folder import Run

TEXT = "The exported folder has the tuned model's logits."


def verify_logits(run: Run, checkpoint: Path, out: Path, size: int, *, adapter: bool) -> str:
    """Compares an export, loaded by other libraries, with the base model and the trained weights.

    Args:
        run: The run.
        checkpoint: The folder of the exported checkpoint.
        out: The exported folder.
        size: Bytes of a whole model.
        adapter: True if the folder is a PEFT folder.

    Returns:
        A sentence with the result.

    Raises:
        TalikError: The logits differ.
    """
    free = min(free_memory(), device_memory(torch.device(run.plan.device))[0])
    if size * 1.5 > free:
        needed = format_bytes(size * 1.5)
        return f"logits not compared: loading it takes {needed} and {format_bytes(free)} are free"
    source = run.source.folder
    ids = (run.model.tokenizer() if adapter else load_tokenizer(out))(TEXT, return_tensors="pt").input_ids
    expected, note = _expected(run, checkpoint, ids, merged=run.recipe.lora is not None and not adapter)
    found = load_model(source if adapter else out, working_dtype(run.recipe), run.plan.device)
    if adapter:
        found = load_adapter_folder(found, out)
    with torch.no_grad():
        logits = found(input_ids=ids.to(expected.device)).logits
    if difference := (logits - expected).abs().max().item():
        raise TalikError(f"its logits differ from the tuned model's by {difference:.3g}", where=out)
    by = "PEFT" if adapter else "plain Transformers"
    return f"loaded by {by}, {ids.numel()} tokens: logits equal to the tuned model's{note}"


@torch.no_grad()
def _expected(run: Run, checkpoint: Path, ids: Tensor, *, merged: bool) -> tuple[Tensor, str]:
    """The tuned model's logits; for merged adapters also a note on their difference from separate
    adapters.
    """
    model, top = load_whole_model(run.recipe, run.plan, run.model)
    load_weights(checkpoint, dict(top.parameters()))
    ids = ids.to(model.device)
    logits = model(input_ids=ids).logits
    if not merged:
        return logits, ""
    merge_adapters(model)
    after = model(input_ids=ids).logits
    difference = (after - logits).abs().max().item()
    return after, f" with its adapters merged, which are up to {difference:.3g} from those before"
