"""The index of a model in several files, model.safetensors.index.json: the file of each tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from talik.base.errors import SourceError
from talik.base.files import read_json

_REMEDY = "Get the model again from where it came."


def index_of(folder: Path) -> Path | None:
    """The index of a model folder; None if all weights are in one file, which Transformers prefers."""
    index = folder / "model.safetensors.index.json"
    return index if index.is_file() and not (folder / "model.safetensors").is_file() else None


def weight_map(index: Path) -> dict[str, str]:
    """The file name of every tensor.

    A file may be a link to somewhere else, as in the cache of a hub; its name must not lead out of the
    folder.

    Raises:
        SourceError: The index is damaged, or names a file outside the folder.
    """
    try:
        value: Any = read_json(index)
    except ValueError as error:
        raise SourceError(f"cannot be read: {str(error)[:200]}", where=index, remedy=_REMEDY) from None
    places = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(places, dict) or not places:
        raise SourceError("is not an index of weights: no weight_map", where=index, remedy=_REMEDY)
    for tensor, name in places.items():
        if not isinstance(name, str) or not _is_inside(name):
            place = f"the tensor {tensor[:200]!r} in {str(name)[:200]!r}"
            raise SourceError(
                f"places {place}, which is not the name of a file in its folder", where=index, remedy=_REMEDY
            )
    return places


def check_places(index: Path, tables: Mapping[str, Collection[str]]) -> None:
    """Raises SourceError if a file lacks a tensor of the index, or if two files hold the same tensor."""
    places = weight_map(index)
    if lost := [name for name, file in places.items() if name not in tables[file]]:
        problem = f"{lost[0][:200]!r} is not in {places[lost[0]]}, where the index places it"
        more = f" ({len(lost):,} such tensors)" if len(lost) > 1 else ""
        raise SourceError(problem + more, where=index, remedy=_REMEDY)
    seen: dict[str, str] = {}
    for file, names in tables.items():
        for name in names:
            if (other := seen.setdefault(name, file)) != file:
                raise SourceError(f"{name[:200]!r} is in {other} and in {file}", where=index, remedy=_REMEDY)


def _is_inside(name: str) -> bool:
    """True for a plain file name, on every operating system."""
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\:\0")
