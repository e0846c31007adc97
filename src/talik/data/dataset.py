"""The data of a run: sources of rows -> examples, with what was recognised and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from talik.base.errors import DataError, UsageError, collect_errors
from talik.base.events import Notify, silent
from talik.base.files import atomic, write_json
from talik.data.preparing.held_out import draws_limit
from talik.data.preparing.prepared_data import Data, Prepared
from talik.data.preparing.stored_examples import examples_digest, lengths_of
from talik.data.preview import length_histogram, preview_text
from talik.data.reading.sources import check_data
from talik.recipe.data_source import DataSource
from talik.recipe.recipe import Recipe, checked_recipe


def read_data(path: str | Path, tokenizer: Any, **options: Any) -> Data:
    """Reads rows and makes examples of them.

    Args:
        path: A file, a folder, a glob, `-`, `hf:ORG/NAME` or `modelscope:ORG/NAME`.
        tokenizer: A tokenizer of Transformers.
        options: The fields of a Recipe that concern data (`talik.cli.options.DATA_FIELDS`).

    Raises:
        DataError: Rows that cannot be used, with file and line.
    """
    recipe = checked_recipe({"model": "-", "data": str(path), **options})
    return read_all(recipe, recipe.data, tokenizer, "reading")


def read_all(
    recipe: Recipe,
    sources: Sequence[DataSource] | str | Path,
    tokenizer: Any,
    use: str,
    *,
    load: Callable[[], Any] | None = None,
    notify: Notify = silent,
) -> Data:
    """All rows of some sources, by the recipe's options."""
    if isinstance(sources, str | Path):
        sources = (DataSource(path=str(sources)),)
    made = Prepared.of(recipe, sources, tokenizer, load, notify)
    return made.data(_weighted(made, sources, np.arange(len(made.examples))), use)


def check_files(recipe: Recipe) -> None:
    """DataError for data that are not there: what can be said before anything is read."""
    sources = (*recipe.data, *(recipe.eval_data or ()))
    collect_errors(*(partial(check_data, source.path) for source in sources))


def read_sets(
    recipe: Recipe, tokenizer: Any, *, load: Callable[[], Any] | None = None, notify: Notify = silent
) -> tuple[Data, Data | None]:
    """The examples that a recipe trains on, and those to evaluate on: other rows, or questions held out.

    Args:
        recipe: Names the sources and the options.
        tokenizer: A tokenizer of Transformers.
        load: Loads it in another process.
        notify: Told what is going on.
    """
    read = partial(Prepared.of, recipe, tokenizer=tokenizer, load=load, notify=notify)
    made = read(recipe.data)
    everything = np.arange(len(made.examples))
    if recipe.eval_data:
        train = made.data(_weighted(made, recipe.data, everything), "training")
        other = read(recipe.eval_data)
        evaluated = _weighted(other, recipe.eval_data, np.arange(len(other.examples)))
        return train, other.data(evaluated, "evaluation")
    if not recipe.held_out:
        return made.data(_weighted(made, recipe.data, everything), "training"), None
    draws = made.examples.column("question")
    held = draws < draws_limit(draws, recipe.held_out)
    if held.all() or not held.any():
        raise DataError(
            f"held_out {recipe.held_out:g} leaves {int((~held).sum())} examples to train on and "
            f"{int(held.sum())} held out",
            where=", ".join(source.path for source in recipe.data),
            remedy="Name more rows, another share, or a file of its own with --eval-data.",
        )
    train = made.data(_weighted(made, recipe.data, everything[~held]), "training")
    return train, made.data(everything[held], "evaluation", whole=False)


def _weighted(made: Prepared, sources: Sequence[DataSource], indices: Any) -> Any:
    """The indices of examples as often as the weights of their sources say; parts of rows are drawn.

    Source after source, and all examples of one that are used again after all of them.
    """
    if all(source.weight == 1 for source in sources):
        return indices
    view = made.examples.at(indices)
    source = np.array([of.source for of in made.files])[view.column("file")]
    weight = np.array([source.weight for source in sources])[source]
    copies = np.floor(weight).astype(np.int64) + (view.column("row") < weight % 1)
    chosen = [
        indices[(source == number) & (copies > time)]
        for number in range(len(sources))
        for time in range(int(copies[source == number].max(initial=0)))
    ]
    if not chosen:
        raise UsageError("the weights of the sources leave no example", remedy="Raise a weight.")
    return np.concatenate(chosen)


def examples_fingerprint(*sets: Data | None) -> str:
    """Names the examples of some sets: every token and which are trained, in order."""
    return examples_digest([data.examples for data in sets if data])


def preview(data: Data, tokenizer: Any, count: int = 3) -> list[Any]:
    """The first `count` examples with their masks, and a histogram of the lengths, as texts of rich."""
    shown: list[Any] = [preview_text(example, tokenizer) for example in data.examples[:count]]
    return [*shown, length_histogram(lengths_of(data.examples))]


def check_positions(config: Any, *sets: Data | None) -> None:
    """UsageError if an example is longer than the model of this config has positions."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(max(lengths_of(data.examples)) for data in sets if data)
    if limit and longest > limit:
        raise UsageError(
            f"the longest example has {longest:,} tokens, and the model has {limit:,} positions",
            remedy=f"Use --max-length {limit}.",
        )


def keep_facts(folder: Path, *sets: Data | None) -> None:
    """Keeps with a run the facts about its chat template, and the rows that were left out."""
    found = [data for data in sets if data is not None]
    facts = found[0].report.facts
    write_json(folder / "template.json", facts.as_dict() if facts else {})
    lines = (line for data in found for line in data.rejected)
    if (first := next(iter(lines), None)) is not None:
        with atomic(folder / "rejected.jsonl") as file:
            file.writelines(line.encode("utf-8", "backslashreplace") for line in chain([first], lines))
