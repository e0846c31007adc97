"""The format of a file, from its first rows and from the options of its source."""

from __future__ import annotations

from pathlib import Path

import pytest

from talik.data.formats.file_format import file_converter, row_options
from talik.data.formats.formats import RowOptions
from talik.data.reading.streams import as_file
from talik.recipe.data_source import DataSource
from talik.recipe.recipe import checked_recipe


def test_the_options_of_a_source_replace_those_of_the_recipe_as_a_whole() -> None:
    recipe = checked_recipe({"model": "-", "data": "-", "input_field": "q", "output_field": "a"})
    assert row_options(DataSource(path="-"), recipe) == RowOptions("q", "a")
    assert row_options(DataSource(path="-", format="text"), recipe) == RowOptions(format="text")


@pytest.mark.parametrize(
    ("content", "options", "name"),
    [
        ('{"prompt": "q", "completion": "a"}', RowOptions(), "prompt-completion"),
        ('{"Q": "q", "text": "a"}', RowOptions("Q", "text"), "fields"),
        ('{"prompt": "q", "completion": "a"}', RowOptions(format="text"), "text"),
        ('{"prompt": ', RowOptions(), "messages"),  # no row can be read: each is reported later
        ('{"prompt": ', RowOptions("Q", "A"), "fields"),
        ('{"prompt": ', RowOptions(format="text"), "text"),
    ],
)
def test_the_format_of_a_file(content: str, options: RowOptions, name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content + "\n", encoding="utf-8")
    assert file_converter(as_file(path), options).name == name
