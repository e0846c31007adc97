"""Recognises the format of a data file from its first rows and from the options of its source."""

from __future__ import annotations

from talik.data.formats.formats import Converter, RowOptions, converter_named, converter_of
from talik.data.reading.file_rows import first_rows
from talik.data.reading.streams import DataFile
from talik.recipe.data_source import DataSource
from talik.recipe.recipe import Recipe


def row_options(source: DataSource, recipe: Recipe) -> RowOptions:
    """Returns the options of a source; those of the recipe if the source has none."""
    own = RowOptions(source.input_field, source.output_field, source.format)
    if own != RowOptions():
        return own
    return RowOptions(recipe.input_field, recipe.output_field, recipe.format)


def file_converter(file: DataFile, options: RowOptions) -> Converter:
    """Returns the converter for the rows of a file.

    If none of the first rows can be read, the format is "messages": each row is then reported as a problem.

    Raises:
        DataError: The file cannot be read, or no format has the fields of its rows.
        UsageError: The options are not valid.
    """
    rows = first_rows(file)
    if not rows and options == RowOptions():
        return converter_named("messages", options)
    return converter_of(rows, options)
