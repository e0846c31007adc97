"""One source of rows in a recipe: a path and, optionally, its weight, limit, format and fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


class DataSource(BaseModel):
    """A source of rows. A plain string in recipe.yaml is the path."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        min_length=1, description="a file, a folder, a glob, -, hf:ORG/NAME or modelscope:ORG/NAME"
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="how often its rows are used in an epoch: 0.3 draws 30 %, 2 uses each twice",
    )
    limit: int | None = Field(default=None, ge=1, description="its first N rows only")
    format: str | None = Field(default=None, description="the data format, in place of the recognised one")
    input_field: str | None = Field(default=None, description="the field that holds the input")
    output_field: str | None = Field(default=None, description="the field that holds the output")


def _as_sources(value: Any) -> Any:
    """Converts a path or a list of paths to the fields of sources."""
    if isinstance(value, str | DataSource):
        value = [value]
    if isinstance(value, list | tuple):
        items = cast(Sequence[Any], value)
        return tuple({"path": item} if isinstance(item, str) else item for item in items)
    return value


def _as_written(sources: Sequence[DataSource]) -> Any:
    """Converts sources to the shortest form: the path alone if nothing else is set."""
    written = [
        s.path if s == DataSource(path=s.path) else s.model_dump(exclude_defaults=True) for s in sources
    ]
    return written[0] if len(written) == 1 and isinstance(written[0], str) else written


if TYPE_CHECKING:  # a path is also accepted, which a type checker cannot know
    DataSources = Any
else:
    DataSources = Annotated[
        tuple[DataSource, ...], BeforeValidator(_as_sources), PlainSerializer(_as_written, return_type=Any)
    ]
