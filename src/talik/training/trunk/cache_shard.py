"""One file of the trunk's cache: which examples are in it, where, and whether they are as they were written.

A shard holds groups, one after another, each as (batch, sequence, width), unpadded: `shard-00000.bin`. Its
table, `shard-00000.json`, has every group's place and a checksum for every example.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from talik.base.errors import ChainError, TalikError
from talik.base.files import fingerprint, read_json
from talik.data.batches import equal_length_groups
from talik.data.examples import Example
from talik.data.preparing.store import ids_of, lengths_of
from talik.model.weights.safetensors_file import tensor_bytes

_PIECE = 1 << 20  # bytes that are read and then, still in the processor's cache, verified


@dataclass(frozen=True, slots=True)
class Group:
    """Examples of one length that go through the trunk together, by their index in the data."""

    indices: tuple[int, ...]
    length: int
    digest: str

    @property
    def tokens(self) -> int:
        """How many tokens all its examples have."""
        return len(self.indices) * self.length


@dataclass(frozen=True, slots=True)
class Place:
    """Where a group lies: `start` in bytes, `length` in tokens, and the checksum of every example."""

    file: Path
    start: int
    length: int
    checksums: array[int]


class Damaged(ValueError):
    """What is wrong with a shard, in words."""


def groups_of(examples: Sequence[Example], batch_tokens: int) -> list[Group]:
    """All examples in groups of at most `batch_tokens` tokens (or one longer example), shortest first."""
    lengths = lengths_of(examples)
    return [_group(examples, i, lengths[i[0]]) for i in equal_length_groups(lengths, batch_tokens)]


def longest_groups(examples: Sequence[Example], batch_tokens: int, count: int) -> list[Group]:
    """The last `count` of these groups, those with the longest examples."""
    lengths = lengths_of(examples)
    chosen = equal_length_groups(lengths, batch_tokens)[-count:]
    return [_group(examples, indices, lengths[indices[0]]) for indices in chosen]


def _group(examples: Sequence[Example], indices: Sequence[int], length: int) -> Group:
    return Group(tuple(indices), length, fingerprint(*(ids_of(examples, index) for index in indices)))


def read_table(file: Path, key: str, token_bytes: int) -> dict[str, Place]:
    """Where the groups of a finished shard lie. Damaged if it is not what its table, or `key`, says."""
    try:
        table = read_json(file.with_suffix(".json"))
        if table["key"] != key:
            raise Damaged("its table belongs to another cache")
        places, tokens = {}, 0
        for group in table["groups"]:
            checksums = array("I", (int(text, 16) for text in group["checksums"].split()))
            if (group["start"], group["count"]) != (tokens, len(checksums)):
                raise Damaged("its table contradicts itself")
            places[group["digest"]] = Place(file, tokens * token_bytes, group["length"], checksums)
            tokens += group["length"] * group["count"]
        size = file.stat().st_size
    except Damaged:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise Damaged(f"its table or the file cannot be read: {error!r}") from None
    if size != tokens * token_bytes:
        raise Damaged(f"it has {size:,} bytes, and its table speaks of {tokens * token_bytes:,}")
    return places


class ShardWriter:
    """A shard that is being written: every group once, in any order."""

    def __init__(self, file: BinaryIO, groups: Sequence[Group], width: int, dtype: torch.dtype) -> None:
        self._file, self._width, self._dtype = file, width, dtype
        self._starts: dict[str, int] = {}
        self._checksums: dict[str, str] = {}
        start = 0
        for group in groups:
            if self._starts.setdefault(group.digest, start) != start:
                raise ChainError(f"group {group.digest} is twice in one shard")
            start += group.tokens
        self._groups = groups

    def write(self, group: Group, hidden: Float[Tensor, "batch sequence width"]) -> None:
        """Takes what the trunk hands on for a group, in the order of its examples, from any device."""
        expected = (len(group.indices), group.length, self._width)
        if tuple(hidden.shape) != expected or hidden.dtype != self._dtype:
            got = f"{tuple(hidden.shape)} of {hidden.dtype}"
            raise ChainError(f"the trunk hands on {got} for a group, not {expected} of {self._dtype}")
        if group.digest not in self._starts or group.digest in self._checksums:
            raise ChainError(f"group {group.digest} is not of this shard, or was written before")
        data, one = tensor_bytes(hidden), group.length * self._width * self._dtype.itemsize
        self._file.seek(self._starts[group.digest] * self._width * self._dtype.itemsize)
        self._file.write(data)
        checksums = (crc32(data[at : at + one]) for at in range(0, len(data), one))
        self._checksums[group.digest] = " ".join(f"{checksum:08x}" for checksum in checksums)

    def finish(self) -> list[dict[str, Any]]:
        """Brings everything to the disk and returns the table."""
        if left := len(self._starts) - len(self._checksums):
            raise ChainError(f"{left} of {len(self._starts)} groups of a shard were not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        return [
            {
                "digest": group.digest,
                "start": self._starts[group.digest],
                "count": len(group.indices),
                "length": group.length,
                "checksums": self._checksums[group.digest],
            }
            for group in self._groups
        ]


class States:
    """Hidden states of examples, by their index in the data. One thread may read at a time."""

    def __init__(self, found: Sequence[tuple[Group, Place]], width: int, dtype: torch.dtype) -> None:
        self._width, self._dtype = width, dtype
        count = 1 + max((max(group.indices) for group, _ in found), default=-1)
        self._numbers, self._lengths = array("I", bytes(4 * count)), array("I", bytes(4 * count))
        self._starts, self._checksums = array("Q", bytes(8 * count)), array("I", bytes(4 * count))
        paths = list(dict.fromkeys(place.file for _, place in found))
        numbers = {path: number for number, path in enumerate(paths)}
        for group, place in found:
            for position, index in enumerate(group.indices):
                self._numbers[index], self._lengths[index] = numbers[place.file], place.length
                self._starts[index] = place.start + position * place.length * width * dtype.itemsize
                self._checksums[index] = place.checksums[position]
        with ExitStack() as opened:  # all of them now: they can be read even if the cache is removed
            self._files = [opened.enter_context(path.open("rb", buffering=0)) for path in paths]
            self._opened = opened.pop_all()

    def read(self, indices: Sequence[int]) -> Float[Tensor, "batch sequence width"]:
        """The hidden states of these examples, right-padded with zeros, on the CPU.

        Every example's checksum is verified. Of a damaged shard the table is removed, so that the next run
        computes it again, and TalikError is raised.
        """
        longest = max(self._lengths[index] for index in indices)
        batch = torch.empty(len(indices), longest, self._width, dtype=self._dtype)
        data, row = tensor_bytes(batch), longest * self._width * self._dtype.itemsize
        for number, index in enumerate(indices):
            if not self._lengths[index]:
                raise IndexError(f"example {index} is in no group")
            size = self._lengths[index] * self._width * self._dtype.itemsize
            self._read(index, data[number * row : number * row + size])
            batch[number, self._lengths[index] :] = 0
        return batch

    def _read(self, index: int, place: memoryview) -> None:
        file, done, checksum = self._files[self._numbers[index]], 0, 0
        try:
            file.seek(self._starts[index])
            while done < len(place) and (more := file.readinto(place[done : done + _PIECE])):
                checksum = crc32(place[done : done + more], checksum)
                done += more
            damage = "is shorter than it was" if done < len(place) else "is not what was written"
        except OSError as error:
            done, damage = -1, f"cannot be read ({error.strerror})"
        if done < len(place) or checksum != self._checksums[index]:
            self._give_up(Path(file.name), index, damage)

    def _give_up(self, path: Path, index: int, damage: str) -> None:
        with suppress(OSError):
            path.with_suffix(".json").unlink(missing_ok=True)
        raise TalikError(
            f"the trunk's cache is damaged: example {index + 1}, at byte {self._starts[index]:,}, {damage}",
            where=path,
            remedy="Go on with the run (talik resume RUN) or start it again: this file is computed anew.",
        )

    def __enter__(self) -> States:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()  # an open file cannot be removed on Windows
