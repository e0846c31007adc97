"""A data file as a stream of text: decompressed, decoded as UTF-8, lines counted as editors do."""

from __future__ import annotations

import contextlib
import gzip
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from talik.base.errors import DataError
from talik.data.reading.guesses import not_utf8
from talik.data.reading.rows import Place

LONGEST_ROW = 64 << 20  # characters of one row; longer ones are named and not read
HEAD = 1 << 16  # bytes by which the kind of a file is recognised
_READ = 1 << 20
_MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"\xfd7zXZ\x00": "xz"}
_BROKEN = (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError, ValueError)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A local file that rows are read from.

    Attributes:
        path: Where it is.
        name: How places name it.
        origin: The DATA argument that it comes from.
    """

    path: Path
    name: str
    origin: str


def as_file(file: DataFile | Path | str) -> DataFile:
    """A path as a data file that is named by it."""
    return file if isinstance(file, DataFile) else DataFile(Path(file), str(file), str(file))


@contextlib.contextmanager
def opened(file: DataFile) -> Iterator[Any]:
    """The bytes of a data file, decompressed.

    Raises:
        DataError: It cannot be read, or its compressed form is broken.
    """
    try:
        with file.path.open("rb") as raw:
            kind = next((kind for magic, kind in _MAGIC.items() if raw.peek(6)[:6].startswith(magic)), None)
            yield raw if kind is None else _decompressed(raw, kind)
    except FileNotFoundError:
        raise DataError("there is no such file", where=file.name) from None
    except _BROKEN as error:
        if isinstance(error, DataError):
            raise
        problem = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
        raise DataError(problem, where=file.name) from None


def _decompressed(raw: IO[bytes], kind: str) -> Any:
    if kind == "gz":
        return gzip.GzipFile(fileobj=raw)
    return lzma.LZMAFile(raw) if kind == "xz" else _Zstandard(raw)


class _Zstandard:
    """The content of a zstd file; its library takes one that is cut off for whole."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._content = raw, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; b"" at the end."""
        while len(self._content) < size and (packed := self._raw.read(_READ)):
            self._content += self._unpacked(packed)
        if not self._content and not self._frame.eof:
            raise EOFError("the compressed file ends before its end")
        found, self._content = self._content[:size], self._content[size:]
        return found

    def _unpacked(self, packed: bytes) -> bytes:
        made = b""
        while packed:
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            made += self._frame.decompress(packed)
            packed = self._frame.unused_data if self._frame.eof else b""
        return made


def head_of(file: DataFile) -> bytes:
    """The first bytes of a data file, decompressed."""
    with opened(file) as stream:
        return stream.read(HEAD)


class TextStream:
    """The text of a data file, a piece at a time, with one kind of line end."""

    def __init__(self, file: DataFile) -> None:
        self.file = file

    def place(self, line: int) -> Place:
        """A line of this file."""
        return Place(self.file.name, line)

    def blocks(self, size: int = _READ) -> Iterator[tuple[int, bytes]]:
        """Whole lines of about `size` bytes with the number of the first: what worker processes are given.

        Line ends are "\\n". A line that is longer than LONGEST_ROW comes in pieces of that length.
        """
        number, rest = 1, b""
        with opened(self.file) as stream:
            for raw in _uniform(stream, size):
                block, newline, tail = (rest + raw).rpartition(b"\n")
                if newline:
                    yield number, block + newline
                    number += block.count(b"\n") + 1
                    rest = tail
                else:
                    rest = tail
                    if len(rest) > LONGEST_ROW:
                        yield number, rest
                        rest = b""
        if rest:
            yield number, rest

    def lines(self) -> Iterator[tuple[int, str | None]]:
        """Each line with its number; None in place of one that is longer than LONGEST_ROW."""
        long = 0  # the number of a line that is too long, while its pieces come
        for number, block in self.blocks():
            for count, line in enumerate(self.decoded(block, number).split("\n")[: block.count(b"\n") or 1]):
                at = number + count
                if at == long:
                    continue
                if len(line) >= LONGEST_ROW:
                    long = at
                yield at, None if at == long else line

    def pieces(self, size: int) -> Iterator[str]:
        """The whole text, at least a line at a time."""
        for number, block in self.blocks(size):
            yield self.decoded(block, number)

    def decoded(self, block: bytes, number: int) -> str:
        """The text of a block whose first line has this number.

        Raises:
            DataError: It is not UTF-8.
        """
        try:
            return block.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(block, error.start, self.place(number), self._first_wrong_byte()) from None

    def _first_wrong_byte(self) -> int:
        """Where the first byte is that is not UTF-8."""
        at, before, rest = 0, 0, b""
        with opened(self.file) as stream:
            while raw := stream.read(_READ):
                try:
                    rest, before = rest + raw, len(rest)
                    rest.decode("utf-8")
                    at, rest = at + len(rest), b""
                except UnicodeDecodeError as error:
                    if error.end < len(rest) or error.start < before:
                        return at + error.start
                    at, rest = at + error.start, rest[error.start :]
        return at


def _uniform(stream: Any, size: int) -> Iterator[bytes]:
    """The bytes of a stream with one kind of line end, without a byte order mark."""
    first, held = True, b""
    while raw := stream.read(size):
        raw = held + raw
        held = b"\r" if raw.endswith(b"\r") else b""  # its "\n" may come next
        raw = raw[: len(raw) - len(held)]
        if first:
            raw, first = raw.removeprefix(b"\xef\xbb\xbf"), False
        yield raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in raw else raw
    if held:
        yield b"\n"
