"""Rows of any format -> JSON lines of messages."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from talik.base.errors import UsageError
from talik.base.events import Notify, Status
from talik.base.files import atomic
from talik.data.formats.formats import RowOptions, converter_of, other_format, to_row
from talik.data.formats.media import MEDIA
from talik.data.reading.file_rows import rows_of
from talik.data.reading.rows import SHOWN, Problem, Row, RowError, refuse
from talik.data.reading.sources import find_data
from talik.data.reading.streams import DataFile
from talik.recipe.recipe import Recipe

PEEKED = 100


@dataclass(slots=True)
class Converted:
    """How many rows were written, and how many were left out."""

    rows: int = 0
    left_out: int = 0


def convert(recipe: Recipe, out: Path, notify: Notify) -> Converted:
    """Writes the rows of a recipe's data as rows of messages; documents stay rows of text.

    Raises:
        UsageError: The file is one of those that are read.
        DataError: Rows cannot be used and are not to be skipped.
    """
    files = [
        file
        for source in recipe.data
        for file in find_data(source.path, lambda line: notify(Status("data", line)))
    ]
    if any(out.exists() and file.path.exists() and out.samefile(file.path) for file in files):
        remedy = "Name another file to write."
        raise UsageError("is one of the files that are read", where=out, remedy=remedy)
    done, problems, kinds = Converted(), list[Problem](), Counter[str]()
    with atomic(out) as stream:
        for file in files:
            _convert(file, recipe, stream, done, problems, kinds)
        if problems:
            found = [(problem.place, problem.text) for problem in problems]
            refuse(
                found, f"{sum(kinds.values()):,} rows: correct them, or leave them out with --bad-rows skip."
            )
    return done


def _convert(
    file: DataFile,
    recipe: Recipe,
    stream: BinaryIO,
    done: Converted,
    problems: list[Problem],
    kinds: Counter[str],
) -> None:
    first = [row for row in islice(rows_of(file), PEEKED) if isinstance(row, Row)]
    converter = converter_of(first, RowOptions(recipe.input_field, recipe.output_field, recipe.format))
    for row in rows_of(file):
        problem = row if isinstance(row, Problem) else None
        if isinstance(row, Row):
            try:
                if (other := other_format(row, converter)) is not None:
                    raise RowError("another format", f"the row has the format '{other}'")
                made = json.dumps(to_row(converter.convert(row)), ensure_ascii=False)
                stream.write(made.encode("utf-8") + b"\n")
                done.rows += 1
            except RowError as error:
                problem = error.at(row.place)
        if problem is None:
            continue
        if recipe.bad_rows == "skip" or (problem.kind == MEDIA and recipe.drop_media):
            done.left_out += 1
        else:
            kinds[problem.kind] += 1
            problems += [problem] if len(problems) < SHOWN else []
