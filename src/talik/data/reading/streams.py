"""Reads a data file as text: decompressed, decoded as UTF-8, with line numbers as editors count them."""

from __future__ import annotations

import contextlib
import gzip
import lzma
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from talik.base.errors import DataError
from talik.data.reading.rows import Place
from talik.data.reading.unreadable_files import not_utf8

LONGEST_ROW = 64 << 20  # characters; longer rows are reported as problems and not read
HEAD = 1 << 16  # bytes from which the kind of a file is recognised
_READ = 1 << 20  # bytes read at a time
_MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"\xfd7zXZ\x00": "xz"}
_READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError, ValueError)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A local file with rows.

    Attributes:
        path: The path of the file.
        name: The name of the file in places and messages.
        origin: The DATA argument that named the file.
    """

    path: Path
    name: str
    origin: str


def as_file(file: DataFile | Path | str) -> DataFile:
    """Returns a path as a data file with the path as its name."""
    return file if isinstance(file, DataFile) else DataFile(Path(file), str(file), str(file))


@contextlib.contextmanager
def opened(file: DataFile) -> Generator[Any]:
    """Opens a data file and yields a stream of its decompressed bytes.

    Raises:
        DataError: The file cannot be read, or the compressed data are corrupt.
    """
    try:
        with file.path.open("rb") as raw:
            kind = next((kind for magic, kind in _MAGIC.items() if raw.peek(6)[:6].startswith(magic)), None)
            yield raw if kind is None else _decompressed(raw, kind)
    except FileNotFoundError:
        raise DataError("there is no such file", where=file.name) from None
    except _READ_ERRORS as error:
        if isinstance(error, DataError):
            raise
        problem = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
        raise DataError(problem, where=file.name) from None


def _decompressed(raw: IO[bytes], kind: str) -> Any:
    if kind == "gz":
        return gzip.GzipFile(fileobj=raw)
    return lzma.LZMAFile(raw) if kind == "xz" else _Zstandard(raw)


class _Zstandard:
    """Decompresses a zstd file and, unlike the library, reports a truncated one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._content = raw, b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()

    def read(self, size: int) -> bytes:
        """Returns the next bytes, at most `size`; b"" at the end of the file."""
        while len(self._content) < size and (packed := self._raw.read(_READ)):
            self._content += self._unpacked(packed)
        if not self._content and not self._frame.eof:
            raise EOFError("the compressed file is truncated")
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
    """Returns the first HEAD bytes of a data file, decompressed."""
    with opened(file) as stream:
        return stream.read(HEAD)


class TextStream:
    """Reads the text of a data file piece by piece, with every line end as "\\n"."""

    def __init__(self, file: DataFile) -> None:
        self.file = file

    def place(self, line: int) -> Place:
        """Returns the place of a line of this file."""
        return Place(self.file.name, line)

    def blocks(self, size: int = _READ) -> Iterator[tuple[int, bytes]]:
        """Yields blocks of whole lines of about `size` bytes, each with the number of its first line.

        Worker processes get these blocks. A line longer than LONGEST_ROW is yielded in pieces of that length.
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
        """Yields each line with its number; None for a line longer than LONGEST_ROW."""
        long = 0  # the number of the line that is too long, while its pieces are read
        for number, block in self.blocks():
            for count, line in enumerate(self.decoded(block, number).split("\n")[: block.count(b"\n") or 1]):
                at = number + count
                if at == long:
                    continue
                if len(line) >= LONGEST_ROW:
                    long = at
                yield at, None if at == long else line

    def pieces(self, size: int) -> Iterator[str]:
        """Yields the whole text in pieces of whole lines."""
        for number, block in self.blocks(size):
            yield self.decoded(block, number)

    def decoded(self, block: bytes, number: int) -> str:
        """Decodes a block whose first line has this number.

        Raises:
            DataError: The block is not UTF-8.
        """
        try:
            return block.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(block, error.start, self.place(number), self._first_wrong_byte()) from None

    def _first_wrong_byte(self) -> int:
        """Returns the offset of the first byte that is not UTF-8."""
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
    """Yields the bytes of a stream with every line end as "\\n", without a byte order mark."""
    first, held = True, b""
    while raw := stream.read(size):
        raw = held + raw
        held = b"\r" if raw.endswith(b"\r") else b""  # a "\n" may follow
        raw = raw[: len(raw) - len(held)]
        if first:
            raw, first = raw.removeprefix(b"\xef\xbb\xbf"), False
        yield raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in raw else raw
    if held:
        yield b"\n"
