"""Reads the data of a run: the examples of all sources, with the recognised formats and the counts."""

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
from talik.data.preparing.prepared_data import Data, PreparedData
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
        options: The fields of a recipe that concern data (`talik.cli.options.DATA_FIELDS`).

    Returns:
        The examples, with the counts of rows, examples and tokens.

    Raises:
        DataError: Rows cannot be used; the error has their files and lines.
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
    """Reads all rows of some sources with the options of a recipe.

    Args:
        recipe: The options.
        sources: The sources, or the path of one.
        tokenizer: A tokenizer of Transformers.
        use: The use of the examples, such as "training".
        load: Loads the tokenizer in another process; None: everything is done in this process.
        notify: Gets events about the progress.

    Raises:
        DataError: Rows cannot be used; the error has their files and lines.
    """
    if isinstance(sources, str | Path):
        sources = (DataSource(path=str(sources)),)
    made = PreparedData.of(recipe, sources, tokenizer, load, notify)
    return made.data(_weighted(made, sources, np.arange(len(made.examples))), use)


def check_files(recipe: Recipe) -> None:
    """Checks that the data of a recipe exist, without reading them.

    Raises:
        DataError: A source does not exist; the error lists all such sources.
    """
    sources = (*recipe.data, *(recipe.eval_data or ()))
    collect_errors(*(partial(check_data, source.path) for source in sources))


def read_sets(
    recipe: Recipe, tokenizer: Any, *, load: Callable[[], Any] | None = None, notify: Notify = silent
) -> tuple[Data, Data | None]:
    """Reads the examples to train on and those to evaluate on.

    The latter are the recipe's evaluation data, or questions that are held out.

    Args:
        recipe: Names the sources and the options.
        tokenizer: A tokenizer of Transformers.
        load: Loads the tokenizer in another process; None: everything is done in this process.
        notify: Gets events about the progress.

    Returns:
        The training set, and the evaluation set or None.

    Raises:
        DataError: Rows cannot be used, or one of the sets would be empty.
    """
    read = partial(PreparedData.of, recipe, tokenizer=tokenizer, load=load, notify=notify)
    made = read(recipe.data)
    everything = np.arange(len(made.examples))
    if recipe.eval_data:
        train = made.data(_weighted(made, recipe.data, everything), "training")
        other = read(recipe.eval_data)
        evaluated = _weighted(other, recipe.eval_data, np.arange(len(other.examples)))
        return train, other.data(evaluated, "evaluation")
    if not recipe.held_out:
        return made.data(_weighted(made, recipe.data, everything), "training"), None
    held = _held_out(made, recipe)
    train = made.data(_weighted(made, recipe.data, everything[~held]), "training")
    return train, made.data(everything[held], "evaluation", whole=False)


def _held_out(made: PreparedData, recipe: Recipe) -> Any:
    """Returns a boolean array: for each example, True if its question is held out."""
    draws = made.examples.column("question")
    held = draws < draws_limit(draws, recipe.held_out)
    if held.all() or not held.any():
        raise DataError(
            f"held_out {recipe.held_out:g} leaves {int((~held).sum())} examples to train on and "
            f"{int(held.sum())} held out",
            where=", ".join(source.path for source in recipe.data),
            remedy="Use more rows, another share, or a separate file with --eval-data.",
        )
    return held


def _weighted(made: PreparedData, sources: Sequence[DataSource], indices: Any) -> Any:
    """Repeats or draws the indices of examples by the weights of their sources.

    A weight of 2.3 uses all examples of a source twice, and then the 30 % of its rows with the lowest draws.
    The result is ordered by source, and within a source by repetition.
    """
    if all(source.weight == 1 for source in sources):
        return indices
    view = made.examples.at(indices)
    source = np.array([file.source for file in made.files])[view.column("file")]
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
    """Returns a digest over all tokens and masks of some sets, in order."""
    return examples_digest([data.examples for data in sets if data])


def preview(data: Data, tokenizer: Any, count: int = 3) -> list[Any]:
    """Renders the first `count` examples with their masks and a histogram of all lengths, for rich."""
    shown: list[Any] = [preview_text(example, tokenizer) for example in data.examples[:count]]
    return [*shown, length_histogram(lengths_of(data.examples))]


def check_positions(config: Any, *sets: Data | None) -> None:
    """Checks that no example is longer than the model's `max_position_embeddings`.

    Raises:
        UsageError: An example is longer.
    """
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(max(lengths_of(data.examples)) for data in sets if data)
    if limit and longest > limit:
        raise UsageError(
            f"the longest example has {longest:,} tokens, and the model has {limit:,} positions",
            remedy=f"Use --max-length {limit}.",
        )


def keep_facts(folder: Path, *sets: Data | None) -> None:
    """Writes the facts about the chat template, and the rows that were left out, to the folder of a run."""
    found = [data for data in sets if data is not None]
    facts = found[0].report.facts
    write_json(folder / "template.json", facts.as_dict() if facts else {})
    lines = (line for data in found for line in data.rejected)
    if (first := next(iter(lines), None)) is not None:
        with atomic(folder / "rejected.jsonl") as file:
            file.writelines(line.encode("utf-8", "backslashreplace") for line in chain([first], lines))
