"""SHA-256 digests of a checkpoint's files: computed while writing, verified before the files are used.

`digests.json` in the checkpoint's folder contains the digest of every other file, as `sha256sum` prints it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from talik.base.errors import RunError, numbered_list
from talik.base.files import quoted, read_json, write_json

WEIGHTS, OPTIMIZER, STATE = FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
DIGESTS = "digests.json"


class HashedFile(io.BufferedWriter):
    """A file that is written sequentially, and the SHA-256 of its bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self.hash = hashlib.sha256()

    def write(self, data: bytes | memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.hash.update(data)
        return super().write(data)


class DigestWriter:
    """Writes the files of a checkpoint into a folder, then their digests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[str, str] = {}

    @contextmanager
    def file(self, name: str) -> Iterator[HashedFile]:
        """Opens a file for writing; its digest is that of the written bytes, without reading them back."""
        with HashedFile(self._folder / name) as file:
            yield file
        self._digests[name] = file.hash.hexdigest()

    def finish(self) -> None:
        """Writes the digests. Call it last."""
        write_json(self._folder / DIGESTS, self._digests)


def verified(checkpoint: Path, names: Collection[str] = FILES) -> Path:
    """Returns the checkpoint after comparing its files with their digests.

    Every file is read once, as a stream: a mapped file would count against a hard limit.

    Args:
        checkpoint: The folder of the checkpoint.
        names: The files that will be used. The others must exist, but are not read.

    Raises:
        RunError: Files are missing, damaged or do not belong to a checkpoint. The error names them, the
            undamaged checkpoints of the run, and what to do.
        FileNotFoundError: The checkpoint was removed meanwhile, because the run saved a newer one.
    """
    damage, foreign = _damage(checkpoint, names), _foreign(checkpoint)
    if not checkpoint.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(checkpoint))
    if damage:
        raise RunError(numbered_list([*damage, *foreign]), where=checkpoint, remedy=_remedy(checkpoint))
    if foreign:
        raise RunError(numbered_list(foreign), where=checkpoint, remedy="Move it out of this folder.")
    return checkpoint


def _damage(checkpoint: Path, names: Collection[str] = FILES) -> list[str]:
    """The missing and the damaged files of a checkpoint, as sentences."""
    try:
        known = read_json(checkpoint / DIGESTS)
    except FileNotFoundError:
        return [f"{DIGESTS} is missing, so the other files cannot be verified"]
    except (OSError, ValueError) as error:
        return [f"{DIGESTS} is damaged: {str(error)[:200]}"]
    if not isinstance(known, dict) or known.keys() != set(FILES):
        return [f"{DIGESTS} is damaged: it does not contain the digests of {', '.join(FILES)}"]
    problems = [_problem(checkpoint / name, known[name] if name in names else None) for name in FILES]
    return [problem for problem in problems if problem]


def _problem(file: Path, digest: str | None) -> str | None:
    """The problem of a file, or None. Without a digest only its existence is checked."""
    if not file.is_file():
        return f"{file.name} is missing"
    if digest is None:
        return None
    try:
        with file.open("rb", buffering=0) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    if found == digest:
        return None
    return f"{file.name} is damaged: its SHA-256 is {found} instead of {str(digest)[:64]}"


def _foreign(checkpoint: Path) -> list[str]:
    """Files that do not belong to a checkpoint, except for hidden system files (.DS_Store, .nfs0001)."""
    there = sorted(path.name for path in checkpoint.iterdir()) if checkpoint.is_dir() else []
    strange = [name for name in there if name not in (*FILES, DIGESTS) and not name.startswith(".")]
    return [f"{name[:200]!r} does not belong to a checkpoint" for name in strange]


def _remedy(checkpoint: Path) -> str:
    """Names the undamaged checkpoints of the run, and how to continue from the newest of them."""
    run = checkpoint.parents[1]
    others = [other for other in sorted(checkpoint.parent.glob("step-*")) if other != checkpoint]
    whole = [other for other in others if not _damage(other)]
    damaged = " and ".join(str(path) for path in (checkpoint, *others) if path not in whole)
    if not whole:
        return (
            "This run has no undamaged checkpoint. Restore the file from a copy; or remove "
            f"{damaged}, and `talik resume {quoted(run)}` begins at the first step."
        )
    newest = whole[-1].name
    return (
        f"Undamaged: {', '.join(path.name for path in whole)}. Remove {damaged}; then {newest} is used, and "
        f"`talik resume {quoted(run)}` continues from it."
    )
