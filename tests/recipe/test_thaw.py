"""The line of `thaw`: every parsed line is written as a line that gives the same layers and parts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talik.base.errors import UsageError
from talik.recipe.thaw import PARTS, Thawed, check_thaw, parse_thaw


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, int]:
    """A line that is valid for a model, and the number of layers of that model."""
    count = draw(st.integers(1, 40))
    index = st.integers(0, count - 1)
    term = st.one_of(
        st.sampled_from(["all", *PARTS]),
        index.map(lambda layer: f"layers.{layer}"),
        st.tuples(index, index).map(lambda pair: f"layers.{min(pair)}-{max(pair)}"),
        st.integers(1, count).map(lambda top: f"top.{top}"),
    )
    terms = draw(st.lists(term, min_size=1, max_size=6))
    return draw(st.sampled_from([",", ", "])).join(terms), count


@given(lines())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_parsed_line_is_written_as_a_line_with_the_same_meaning(made: tuple[str, int]) -> None:
    line, count = made
    parsed = parse_thaw(line, count)
    check_thaw(str(parsed))
    assert parse_thaw(str(parsed), count) == parsed


@given(lines())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_layers_are_ascending_and_those_of_the_model(made: tuple[str, int]) -> None:
    line, count = made
    parsed = parse_thaw(line, count)
    assert list(parsed.layers) == sorted(set(parsed.layers))
    assert set(parsed.layers) <= set(range(count)) and 0 <= parsed.cut <= count


def test_the_shortest_line_is_written() -> None:
    assert str(parse_thaw("layers.2,layers.3,norm", 4)) == "top.2,norm"
    assert str(parse_thaw("layers.0-1, layers.3,head", 5)) == "layers.0-1,layers.3,head"
    assert str(parse_thaw("norm, all", 4)) == "all"
    assert str(parse_thaw("top.4,norm,head,embeddings", 4)) == "top.4,norm,head,embeddings"


def test_all_includes_the_parameters_without_a_name_in_the_line() -> None:
    assert parse_thaw("all", 2) == Thawed(2, (0, 1), frozenset({*PARTS, "other"}))
    assert "other" not in parse_thaw("top.2,norm,head,embeddings", 2).parts


@pytest.mark.parametrize(
    "line", ["", "top.0", "top.5", "layers.4", "layers.2-1", "layers.1-4", "norm,", "al"]
)
def test_a_line_that_is_wrong_or_beyond_the_model_is_refused(line: str) -> None:
    with pytest.raises(UsageError, match="thaw: "):
        parse_thaw(line, 4)
