"""A file of rows -> examples, with what was recognised and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from talik.data.batches import split_held_out
from talik.data.examples import Example
from talik.data.formats import conversations
from talik.data.labels import make_examples
from talik.data.messages import Conversation, Document
from talik.data.preview import length_histogram, preview_text
from talik.data.reading import check_file, read_rows
from talik.data.report import Report
from talik.errors import DataError, UsageError, together
from talik.files import fingerprint
from talik.recipe import Recipe, check


@dataclass(frozen=True, slots=True)
class Data:
    """Examples made of a file of rows: what they are for, the format recognised, what was counted."""

    path: str
    use: str
    format: str
    examples: list[Example]
    report: Report


def read_data(path: str | Path, tokenizer: Any, **options: Any) -> Data:
    """Reads a file of rows and makes examples of it.

    `tokenizer` is a fast tokenizer of Transformers; `options` are the fields of a Recipe that concern data:
    input_field, output_field, train_on, max_length, too_long. Raises DataError with file and line.
    """
    recipe = check({"model": "-", "data": str(path), **options})
    return read_all(recipe, path, tokenizer, "reading")


def read_all(recipe: Recipe, path: str | Path, tokenizer: Any, use: str) -> Data:
    """All rows of one file, by the recipe's options."""
    form, found = conversations(read_rows(Path(path)), recipe.input_field, recipe.output_field)
    return _make(recipe, path, form, found, tokenizer, use)


def check_files(recipe: Recipe) -> None:
    """DataError for files of rows that are not there: what can be said before anything is read."""
    together(*(partial(check_file, Path(path)) for path in (recipe.data, recipe.eval_data) if path))


def read_sets(recipe: Recipe, tokenizer: Any) -> tuple[Data, Data | None]:
    """What a recipe trains on, and what it evaluates on: a file of its own, or the questions held out."""
    if recipe.eval_data:
        train = read_all(recipe, recipe.data, tokenizer, "training")
        return train, read_all(recipe, recipe.eval_data, tokenizer, "evaluation")
    if not recipe.held_out:
        return read_all(recipe, recipe.data, tokenizer, "training"), None
    form, found = conversations(read_rows(Path(recipe.data)), recipe.input_field, recipe.output_field)
    kept, held = split_held_out(found, recipe.held_out, recipe.seed)
    if not (kept and held):
        raise DataError(
            f"held_out {recipe.held_out} leaves {len(kept)} rows to train on and {len(held)} held out",
            where=recipe.data,
            remedy="Name more rows, another share, or a file of its own with --eval-data.",
        )
    train = _make(recipe, recipe.data, form, kept, tokenizer, "training")
    return train, _make(recipe, recipe.data, form, held, tokenizer, "evaluation")


def _make(
    recipe: Recipe,
    path: str | Path,
    form: str,
    found: Sequence[Conversation | Document],
    tokenizer: Any,
    use: str,
) -> Data:
    examples, report = make_examples(
        found,
        tokenizer,
        train_on=recipe.train_on,
        max_length=recipe.max_length,
        too_long=recipe.too_long,
    )
    return Data(str(path), use, form, examples, report)


def examples_fingerprint(*sets: Data | None) -> str:
    """Names the examples of some sets: every token and which are trained, in order."""
    examples = (example for data in sets if data for example in data.examples)
    return fingerprint(*(part for e in examples for part in (e.input_ids.tobytes(), repr(e.spans))))


def preview(data: Data, tokenizer: Any, count: int = 3) -> list[Any]:
    """The first `count` examples with their masks, and a histogram of the lengths, as texts of rich."""
    shown: list[Any] = [preview_text(example, tokenizer) for example in data.examples[:count]]
    return [*shown, length_histogram([example.length for example in data.examples])]


def check_positions(config: Any, *sets: Data | None) -> None:
    """UsageError if an example is longer than the model of this config has positions."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(example.length for data in sets if data for example in data.examples)
    if limit and longest > limit:
        raise UsageError(
            f"the longest example has {longest:,} tokens, and the model has {limit:,} positions",
            remedy=f"Use --max-length {limit}.",
        )
