"""The model card of an export: the model, its use, measured results, the recipe."""

from __future__ import annotations

from pathlib import Path

import yaml

from talik.base.files import read_json
from talik.recipe.thaw import PARTS, layers_in_words
from talik.training.run.folder import Run

USE = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
ADAPTER_USE = """from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(base)
model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)  # in the dtype of the training
"""


def base_name(run: Run) -> str:
    """The name of the base model: its hub id, or the name of its folder without the path."""
    local = run.source.kind in ("folder", "gguf")
    return Path(run.source.origin).name if local else run.source.origin


def model_card(run: Run, checkpoint: Path, *, adapter: bool = False) -> str:
    """The text of README.md in the exported folder, without paths of the machine."""
    state = read_json(checkpoint / "state.json")
    marks = state["evaluations"]
    mark = next((mark for mark in marks[1:] if mark["step"] == state["step"]), None)
    measured = "Not evaluated.\n"
    if mark:
        rows = [("base", marks[0]), ("tuned", mark)]
        for source, tuned in mark.get("by_source", {}).items():
            name = Path(source).name
            rows += [(f"base, {name}", marks[0]["by_source"][source]), (f"tuned, {name}", tuned)]
        measured = "| model | loss per trained token | token accuracy |\n|---|---|---|\n" + "".join(
            f"| {name} | {one['loss']:.4f} | {100 * one['accuracy']:.1f} % |\n" for name, one in rows
        )
        measured += f"\nOn {mark['trained_tokens']:,} trained tokens of the evaluation set.\n"
    # Paths of the user's machine do not belong in a card.
    recipe = run.recipe.model_dump(exclude={"cache"}) | {"model": base_name(run)}
    sets = {"data": run.recipe.data, "eval_data": run.recipe.eval_data}
    for key, sources in sets.items():
        if sources:
            named = [source.model_copy(update={"path": Path(source.path).name}) for source in sources]
            recipe[key] = run.recipe.model_copy(update={key: tuple(named)}).model_dump()[key]
    return (
        f"---\nlibrary_name: {'peft' if adapter else 'transformers'}\npipeline_tag: text-generation\n---\n\n"
        f"# {recipe['model']}, fine-tuned\n\n"
        f"Trained with Talik, {checkpoint.name}: {_trained(run)}. Everything else is as it was.\n\n"
        f"```python\n{ADAPTER_USE if adapter else USE}```\n\n"
        "Ask it by the chat template of this folder, which is the one that it was trained by: "
        "`tokenizer.apply_chat_template`.\n\n"
        f"## Measured\n\n{measured}\n## Recipe\n\n```yaml\n"
        f"{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```\n"
    )


def _trained(run: Run) -> str:
    """The trained parts in words."""
    wanted = run.recipe.thawed(run.plan.layers)
    layers = layers_in_words(wanted.layers)
    of = [f"{', '.join(layers)} of {wanted.count}"] if layers else []
    if run.recipe.lora is not None:
        return f"adapters ({run.recipe.lora}) on {', '.join(of)}"
    own = {"head": "the head (with weights of its own)" if wanted.unties else "the head"}
    own |= {"norm": "the final norm", "embeddings": "the embeddings"}
    return ", ".join([*of, *(own[part] for part in PARTS if part in wanted.parts)])
