"""Finds the data files that a DATA argument names.

The argument is a file, a folder, a glob, `-` for standard input, or a data set on a hub as
`hf:ORG/NAME[:CONFIG][:SPLIT]` or `modelscope:ORG/NAME[:SPLIT]`.
"""

from __future__ import annotations

import atexit
import difflib
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from talik.base.errors import DataError
from talik.base.files import read_json
from talik.base.libraries import need_packages, one_line
from talik.data.reading.file_rows import TEXT, check_file, suffix_of
from talik.data.reading.streams import DataFile
from talik.recipe.data_source import DataSource

HUB, MODELSCOPE, INPUT = "hf:", "modelscope:", "-"
_ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
# Files that describe data and hold no rows.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_ABOUT_TEXT = re.compile(r"(readme|license|licence|notice|changelog|citation|contributing)\b", re.IGNORECASE)
_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^:]+){0,2}")
Say = Callable[[str], None]  # gets one line about a choice that was made


def check_data(data: str) -> None:
    """Checks a DATA argument without reading data or using the network.

    Raises:
        DataError: No file, folder or match exists, or the name of a hub's data set is invalid.
    """
    if data.startswith((HUB, MODELSCOPE)):
        prefix, _, name = data.partition(":")
        if not _ID.fullmatch(name):
            remedy = (
                f"Write it as {prefix}:ORG/NAME, {prefix}:ORG/NAME:SPLIT or {prefix}:ORG/NAME:CONFIG:SPLIT."
            )
            raise DataError("this is not the name of a data set", where=data, remedy=remedy)
    elif data != INPUT:
        _local(data, lambda line: None)


def find_data(data: str, say: Say = lambda line: None) -> list[DataFile]:
    """Returns the local files that a DATA argument names, in a fixed order.

    Args:
        data: The argument.
        say: Gets one line about each choice of files, such as the split that is read.

    Raises:
        DataError: Nothing has that name, or a hub's data set cannot be downloaded.
    """
    check_data(data)
    if data == INPUT:
        return [_standard_input()]
    if data.startswith(HUB):
        return _from_hub(data, say)
    if data.startswith(MODELSCOPE):
        return _from_modelscope(data, say)
    return [DataFile(path, str(path), data) for path in _local(data, say)]


def whole_source(source: DataSource) -> DataSource:
    """Returns a source with an absolute path; hub data sets and standard input are unchanged."""
    if source.path == INPUT or source.path.startswith((HUB, MODELSCOPE)):
        return source
    return source.model_copy(update={"path": str(Path(source.path).expanduser().absolute())})


def file_state(file: DataFile) -> str:
    """Returns the name, size and modification time of a file, which change when its content does."""
    state = file.path.stat()
    return f"{file.name} {state.st_size} {state.st_mtime_ns}"


# Files, folders, globs


def _local(data: str, say: Say) -> list[Path]:
    """Returns the files of a path or a glob."""
    try:
        if "\0" in data:
            raise ValueError("a file name cannot contain the NUL character")
        path = Path(data).expanduser()
        if path.is_dir():
            return _of_folder(path, say)
        if path.exists() or not any(mark in data for mark in "*?["):
            _check_there(path)
            return [path]
    except (OSError, ValueError, RuntimeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise DataError(f"cannot be used: {reason}", where=data[:200]) from None
    matches = sorted(Path(match) for match in glob.glob(data, recursive=True))  # noqa: PTH207
    if not (files := [path for path in matches if path.is_file()]):
        raise DataError("no file matches", where=data, remedy="Name a file, a folder or another pattern.")
    return files


def _check_there(path: Path) -> None:
    if path.exists() or not path.parent.is_dir():
        return check_file(path)
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names)
    remedy = f"In {path.parent} there is: {', '.join(near)}" if near else None
    raise DataError("there is no such file", where=path, remedy=remedy)


def _of_folder(folder: Path, say: Say) -> list[Path]:
    """Returns the data files of a folder: those of `datasets`, else all with rows, else all text files."""
    if (folder / "dataset_dict.json").is_file():
        folder = _split_of(folder, say)
    if saved := _saved(folder):
        return saved
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder))
    rows = [path for path in found if suffix_of(path) in _ROWS and path.name not in _ABOUT]
    texts = [path for path in found if suffix_of(path) in TEXT and not _ABOUT_TEXT.match(path.name)]
    chosen = rows or texts
    if not chosen:
        kinds = ", ".join((*_ROWS, *TEXT))
        raise DataError("this folder has no data files", where=folder, remedy=f"Data files are {kinds}.")
    if others := [path.name for path in found if path not in chosen]:
        more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
        say(f"{folder}: {len(chosen):,} files are read; not read: {', '.join(others[:5])}{more}")
    return chosen


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)


def _split_of(folder: Path, say: Say) -> Path:
    """Returns the split to read from a folder of `datasets`: "train", or else the first."""
    splits = sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file())
    if not splits:
        return folder
    chosen = "train" if "train" in splits else splits[0]
    if len(splits) > 1:
        others = ", ".join(str(folder / split) for split in splits if split != chosen)
        say(f"{folder}: the split {chosen!r} is read; not read: {others}")
    return folder / chosen


def _saved(folder: Path) -> list[Path]:
    """Returns the Arrow files of a folder saved by `datasets`; [] for any other folder."""
    try:
        state = read_json(folder / "state.json")
        files = [folder / str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [file for file in files if file.parent == folder and file.is_file()]


# Standard input


def _standard_input() -> DataFile:
    """Copies standard input to a temporary file, which is removed when the process ends."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        remedy = "Pipe rows into it: cat rows.jsonl | talik ..."
        raise DataError("nothing is piped into standard input", where=INPUT, remedy=remedy)
    handle, name = tempfile.mkstemp(prefix="talik-input-")
    atexit.register(lambda: Path(name).unlink(missing_ok=True))
    with os.fdopen(handle, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return DataFile(Path(name), INPUT, INPUT)


# Hubs


def _named(data: str) -> tuple[str, str | None, str | None]:
    """The id, the configuration and the split of a hub's data set."""
    name, *more = data.partition(":")[2].split(":")
    if len(more) == 2:
        return name, more[0], more[1]
    return name, None, more[0] if more else None


def _from_hub(data: str, say: Say) -> list[DataFile]:
    """Returns the Arrow files of a data set in the cache of `datasets`. Code of the data set is never run."""
    need_packages("datasets", "datasets", where=data)
    import datasets  # pyright: ignore[reportMissingTypeStubs]

    name, config, split = _named(data)
    load = cast(Any, datasets).load_dataset
    try:
        loaded = load(name, config)
    except ValueError as error:
        if split is None or config is not None:
            raise _hub_error(data, error) from None
        try:  # hf:ORG/NAME:X names a split, or else a configuration
            loaded, split = load(name, split), None
        except Exception as second:  # the library's errors share no base class
            raise _hub_error(data, second) from None
    except Exception as error:
        raise _hub_error(data, error) from None
    return [DataFile(path, f"{data}/{path.name}", data) for path in _arrow_files(data, loaded, split, say)]


def _arrow_files(data: str, loaded: Any, split: str | None, say: Say) -> Iterator[Path]:
    """Yields the Arrow files of a split: the named one, else "train", else the first."""
    splits = list(loaded)
    if split is not None and split not in splits:
        raise DataError(
            f"the data set has no split {split!r}; its splits are {', '.join(splits)}", where=data
        )
    chosen = split or ("train" if "train" in splits else splits[0])
    if split is None and len(splits) > 1:
        others = ", ".join(name for name in splits if name != chosen)
        say(f"{data}: the split {chosen!r} is read; not read: {others}")
    for file in loaded[chosen].cache_files:
        yield Path(file["filename"])


def _hub_error(data: str, error: Exception) -> DataError:
    remedy = (
        "Check the name and the connection. Without one, the data set must be in the cache of `datasets`."
    )
    return DataError(f"the data set cannot be downloaded: {one_line(error)}", where=data, remedy=remedy)


def _from_modelscope(data: str, say: Say) -> list[DataFile]:
    """Downloads a data set of ModelScope and returns its data files."""
    need_packages("modelscope", "modelscope", where=data)
    import modelscope  # pyright: ignore[reportMissingTypeStubs]

    download = cast(Any, modelscope).dataset_snapshot_download
    name, _, split = _named(data)
    try:
        folder = Path(download(name))
    except Exception as error:  # the library's errors share no base class over its versions
        command = f"modelscope download --dataset {name}"
        raise DataError(
            f"the data set cannot be downloaded: {one_line(error)}", where=data, remedy=command
        ) from None
    files = _of_folder(folder, say)
    if split is not None:
        files = [file for file in files if split in re.split(r"[\W_]+", str(file.relative_to(folder)))]
        if not files:
            raise DataError(f"the data set has no file for the split {split!r}", where=data)
    return [DataFile(path, f"{data}/{path.relative_to(folder)}", data) for path in files]
