"""Reads and writes safetensors files by byte range.

The format: 8 bytes (little endian) with the length of a JSON header, the header with dtype, shape and byte
range of every tensor, then the bytes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from talik.base.errors import SourceError
from talik.base.system import drop_pages
from talik.model.weights.index import check_places, index_of, weight_map
from talik.model.weights.safetensors_header import read_ranges

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint: its file and byte range."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Tensor:
        """Reads the tensor into new memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor_bytes(tensor))
        return tensor

    @torch.no_grad()
    def read_to(self, tensor: Tensor) -> None:
        """Reads into a tensor of the same shape and dtype, without a copy if it is on the CPU."""
        like = (tensor.dtype, tuple(tensor.shape)) == (self.dtype, self.shape)
        if like and tensor.device.type == "cpu" and tensor.is_contiguous():
            self.read_into(tensor_bytes(tensor))
        else:
            tensor.copy_(self.read())

    def part(self, first: int, count: int) -> Entry:
        """`count` elements of the tensor from `first` on, as a one-dimensional tensor."""
        start, size = first * self.dtype.itemsize, count * self.dtype.itemsize
        if first < 0 or start + size > self.size:
            raise SourceError(f"{count:,} elements from {first:,} on are not in the tensor", where=self.file)
        return replace(self, shape=(count,), start=self.start + start, size=size)

    def read_into(self, place: memoryview, *, forget: bool = False) -> None:
        """Reads the bytes of the tensor into memory of exactly `size` bytes.

        Args:
            place: The memory.
            forget: Drop the bytes from the page cache afterwards.

        Raises:
            SourceError: The memory has another size, or the file ends before the tensor does.
        """
        if len(place) != self.size:  # a larger one would get bytes of the next tensor
            problem = f"the tensor has {self.size:,} bytes, and is read into {len(place):,}"
            raise SourceError(problem, where=self.file)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.size:
                if not (more := file.readinto(place[done:])):
                    raise SourceError("is shorter than its header says", where=self.file)
                done += more
            if forget:
                drop_pages(file.fileno(), self.start, self.size)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        SourceError: The index is damaged, or names a file outside of the folder.
    """
    if index := index_of(folder):
        return [folder / name for name in sorted(set(weight_map(index).values()))]
    return [folder / "model.safetensors"]


def read_header(file: Path) -> dict[str, Entry]:
    """The table of one safetensors file.

    Raises:
        SourceError: The file breaks a rule of the format, or holds a dtype that Talik does not train.
    """
    found = read_ranges(file)
    if strange := next((name for name, (dtype, *_) in found.items() if dtype not in DTYPES), None):
        problem = f"tensor {strange[:200]!r} has the dtype {found[strange][0]}, which Talik does not read"
        raise SourceError(problem, where=file, remedy="Name the model in bf16, fp16 or fp32.")
    return {
        name: Entry(file, DTYPES[dtype], shape, start, size)
        for name, (dtype, shape, start, size) in found.items()
    }


def read_tables(folder: Path) -> dict[Path, dict[str, Entry]]:
    """The tables of all weight files of a model folder.

    Raises:
        SourceError: A file breaks a rule of the format, lacks a tensor that the index places there, or holds
            one that another file holds, too.
    """
    tables = {file: read_header(file) for file in weight_files(folder)}
    if index := index_of(folder):
        check_places(index, {file.name: table.keys() for file, table in tables.items()})
    return tables


def write_tensors(file: BinaryIO, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
    """Writes the header for these tensors; their bytes must follow in the same order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape in tensors:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, start + size],
        }
        start += size
    data = json.dumps(header, ensure_ascii=False).encode("utf-8")
    data += b" " * (-len(data) % 8)
    file.write(len(data).to_bytes(8, "little") + data)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as in a file; shares memory with a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def copy_bytes(entry: Entry, file: BinaryIO, piece: int = 16 << 20) -> None:
    """Copies the bytes of a tensor unchanged."""
    for data in pieces(entry, piece):
        file.write(data)


def pieces(entry: Entry, piece: int = 16 << 20) -> Iterator[bytes]:
    """The bytes of a tensor, at most `piece` at a time."""
    with entry.file.open("rb") as source:
        source.seek(entry.start)
        for start in range(0, entry.size, piece):
            yield source.read(min(piece, entry.size - start))
