"""The model card of an export: what it is, how to use it, what was measured, the recipe."""

from __future__ import annotations

from pathlib import Path

import yaml

from talik.files import read_json
from talik.train.run_folder import Run


def model_card(run: Run, checkpoint: Path) -> str:
    """README.md of the exported folder, without paths of the machine that it was made on."""
    marks = read_json(checkpoint / "state.json")["evaluations"]
    measured = "Not evaluated.\n"
    if marks[1:]:
        best = min(marks[1:], key=lambda mark: mark["loss"])
        rows = [("base", marks[0]), ("tuned", best)]
        measured = "| model | loss per trained token | token accuracy |\n|---|---|---|\n" + "".join(
            f"| {name} | {mark['loss']:.4f} | {100 * mark['accuracy']:.1f} % |\n" for name, mark in rows
        )
        measured += f"\nOn {best['trained_tokens']:.0f} trained tokens that were held out.\n"
    # Paths of somebody's machine do not belong into a card.
    names = {key: Path(str(getattr(run.recipe, key))).name for key in ("data", "eval_data")}
    recipe = run.recipe.model_dump(exclude={"cache"}) | {"model": run.source.origin}
    recipe |= {key: name for key, name in names.items() if recipe[key] is not None}
    if run.source.kind in ("folder", "gguf"):
        recipe["model"] = Path(run.source.origin).name
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {recipe['model']}, fine-tuned\n\n"
        f"Layers {run.plan.cut} to {run.plan.layers - 1} of {run.plan.layers} and the final norm were "
        f"trained with Talik ({checkpoint.name}).\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```\n\n"
        f"## Measured\n\n{measured}\n## Recipe\n\n```yaml\n"
        f"{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```\n"
    )
