"""Converts rows of any format to JSON lines of messages."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from talik.base.errors import UsageError
from talik.base.events import Notify, Status
from talik.base.files import atomic
from talik.data.formats.file_format import file_converter, row_options
from talik.data.formats.formats import RowOptions, to_row
from talik.data.formats.media import MEDIA
from talik.data.reading.file_rows import rows_of
from talik.data.reading.rows import SHOWN, Problem, RowError, refuse
from talik.data.reading.sources import find_data
from talik.data.reading.streams import DataFile
from talik.recipe.recipe import Recipe


@dataclass(slots=True)
class ConvertedRows:
    """The numbers of rows that were written and left out, and the problems of rows that are refused.

    Attributes:
        problems: The first problems, to be shown.
        kinds: The number of problems of each kind.
    """

    rows: int = 0
    left_out: int = 0
    problems: list[Problem] = field(default_factory=list[Problem])
    kinds: Counter[str] = field(default_factory=Counter[str])

    def refuse(self, problem: Problem) -> None:
        """Counts a problem that stops the conversion."""
        self.kinds[problem.kind] += 1
        if len(self.problems) < SHOWN:
            self.problems.append(problem)


def convert(recipe: Recipe, out: Path, notify: Notify) -> ConvertedRows:
    """Writes the rows of a recipe's data as rows of messages, and documents as rows of text.

    Args:
        recipe: Names the data and the options for reading them.
        out: The file to write.
        notify: Gets events about the choice of files.

    Raises:
        UsageError: `out` is one of the files that are read.
        DataError: Rows cannot be used, and `bad_rows` is "refuse".
    """
    inputs = [
        (file, row_options(source, recipe))
        for source in recipe.data
        for file in find_data(source.path, lambda line: notify(Status("data", line)))
    ]
    if any(out.exists() and file.path.exists() and out.samefile(file.path) for file, _ in inputs):
        remedy = "Name another file to write."
        raise UsageError("this is one of the files that are read", where=out, remedy=remedy)
    done = ConvertedRows()
    with atomic(out) as stream:
        for file, options in inputs:
            _convert(file, options, recipe, stream, done)
        if done.problems:
            found = [(problem.place, problem.text) for problem in done.problems]
            count = done.kinds.total()
            refuse(found, f"{count:,} rows: correct them, or leave them out with --bad-rows skip.")
    return done


def _convert(
    file: DataFile, options: RowOptions, recipe: Recipe, stream: BinaryIO, done: ConvertedRows
) -> None:
    converter = file_converter(file, options)
    for row in rows_of(file):
        try:
            if isinstance(row, Problem):
                raise RowError(row.kind, row.text, row.field)
            made = json.dumps(to_row(converter.convert(row)), ensure_ascii=False)
            stream.write(made.encode("utf-8") + b"\n")
            done.rows += 1
        except RowError as error:
            if recipe.bad_rows == "skip" or (error.kind == MEDIA and recipe.drop_media):
                done.left_out += 1
            else:
                done.refuse(error.at(row.place))
