"""One shard of the trunk's cache.

`shard-00000.bin` contains batch groups one after another, each as (batch, sequence, width) without padding.
Its table, `shard-00000.json`, has the place of every batch group and a CRC-32 of every example.
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
from talik.data.preparing.stored_examples import ids_of, lengths_of
from talik.model.weights.safetensors_file import tensor_bytes

_READ_BYTES = 1 << 20  # bytes that are read, and verified while they are still in the CPU's cache


@dataclass(frozen=True, slots=True)
class BatchGroup:
    """Examples of equal length that go through the trunk together.

    Attributes:
        indices: The indices of the examples in the data.
        length: The length of each example in tokens.
        digest: A hash of their tokens.
    """

    indices: tuple[int, ...]
    length: int
    digest: str

    @property
    def tokens(self) -> int:
        """The number of tokens of all its examples."""
        return len(self.indices) * self.length


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """The place of a batch group in a shard.

    Attributes:
        file: The shard.
        start: The first byte.
        length: The length of each example in tokens.
        checksums: The CRC-32 of each example.
    """

    file: Path
    start: int
    length: int
    checksums: array[int]


class ShardDamagedError(ValueError):
    """A shard does not match its table, or its table is invalid."""


def groups_of(examples: Sequence[Example], batch_tokens: int) -> list[BatchGroup]:
    """Divides examples into batch groups of at most `batch_tokens` tokens, shortest examples first.

    An example that is longer is a batch group by itself.
    """
    lengths = lengths_of(examples)
    return [_group(examples, i, lengths[i[0]]) for i in equal_length_groups(lengths, batch_tokens)]


def longest_groups(examples: Sequence[Example], batch_tokens: int, count: int) -> list[BatchGroup]:
    """The last `count` batch groups, which have the longest examples."""
    lengths = lengths_of(examples)
    chosen = equal_length_groups(lengths, batch_tokens)[-count:]
    return [_group(examples, indices, lengths[indices[0]]) for indices in chosen]


def _group(examples: Sequence[Example], indices: Sequence[int], length: int) -> BatchGroup:
    return BatchGroup(tuple(indices), length, fingerprint(*(ids_of(examples, index) for index in indices)))


def read_table(file: Path, key: str, token_bytes: int) -> dict[str, GroupPlace]:
    """Reads the table of a complete shard.

    Args:
        file: The shard.
        key: The key of its cache.
        token_bytes: The size of one hidden state.

    Returns:
        The place of each batch group, by digest.

    Raises:
        ShardDamagedError: The table is invalid, belongs to another cache, or does not match the file's size.
    """
    try:
        table = read_json(file.with_suffix(".json"))
        if table["key"] != key:
            raise ShardDamagedError("its table belongs to another cache")
        places: dict[str, GroupPlace] = {}
        tokens = 0
        for group in table["groups"]:
            checksums = array("I", (int(text, 16) for text in group["checksums"].split()))
            if (group["start"], group["count"]) != (tokens, len(checksums)):
                raise ShardDamagedError("its table contradicts itself")
            places[group["digest"]] = GroupPlace(file, tokens * token_bytes, group["length"], checksums)
            tokens += group["length"] * group["count"]
        size = file.stat().st_size
    except ShardDamagedError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ShardDamagedError(f"its table or the file cannot be read: {error!r}") from None
    if size != tokens * token_bytes:
        raise ShardDamagedError(f"it has {size:,} bytes instead of {tokens * token_bytes:,}")
    return places


class ShardWriter:
    """Writes a shard: each of its batch groups once, in any order."""

    def __init__(self, file: BinaryIO, groups: Sequence[BatchGroup], width: int, dtype: torch.dtype) -> None:
        self._file, self._width, self._dtype = file, width, dtype
        self._starts: dict[str, int] = {}
        self._checksums: dict[str, str] = {}
        start = 0
        for group in groups:
            if self._starts.setdefault(group.digest, start) != start:
                raise ChainError(f"batch group {group.digest} is twice in one shard")
            start += group.tokens
        self._groups = groups

    def write(self, group: BatchGroup, hidden: Float[Tensor, "batch sequence width"]) -> None:
        """Writes the hidden states of a batch group, in the order of its examples, from any device."""
        expected = (len(group.indices), group.length, self._width)
        if tuple(hidden.shape) != expected or hidden.dtype != self._dtype:
            got = f"{tuple(hidden.shape)} of {hidden.dtype}"
            raise ChainError(
                f"the trunk's output for a batch group is {got}, not {expected} of {self._dtype}"
            )
        if group.digest not in self._starts or group.digest in self._checksums:
            raise ChainError(f"batch group {group.digest} is not of this shard, or was written before")
        data, one = tensor_bytes(hidden), group.length * self._width * self._dtype.itemsize
        self._file.seek(self._starts[group.digest] * self._width * self._dtype.itemsize)
        self._file.write(data)
        checksums = (crc32(data[at : at + one]) for at in range(0, len(data), one))
        self._checksums[group.digest] = " ".join(f"{checksum:08x}" for checksum in checksums)

    def finish(self) -> list[dict[str, Any]]:
        """Syncs the file to the disk and returns the table."""
        if left := len(self._starts) - len(self._checksums):
            raise ChainError(f"{left} of {len(self._starts)} batch groups of a shard were not written")
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


class CachedStates:
    """The hidden states of examples, by index in the data. Only one thread may read at a time."""

    def __init__(
        self, found: Sequence[tuple[BatchGroup, GroupPlace]], width: int, dtype: torch.dtype
    ) -> None:
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
        with ExitStack() as opened:  # open all now, so that they can be read even if the cache is removed
            self._files = [opened.enter_context(path.open("rb", buffering=0)) for path in paths]
            self._opened = opened.pop_all()

    def read(self, indices: Sequence[int]) -> Float[Tensor, "batch sequence width"]:
        """The hidden states of these examples, right-padded with zeros, on the CPU.

        Raises:
            TalikError: The checksum of an example is wrong. The table of the shard is removed, so that the
                next run computes it again.
        """
        longest = max(self._lengths[index] for index in indices)
        batch = torch.empty(len(indices), longest, self._width, dtype=self._dtype)
        data, row = tensor_bytes(batch), longest * self._width * self._dtype.itemsize
        for number, index in enumerate(indices):
            if not self._lengths[index]:
                raise IndexError(f"example {index} is in no batch group")
            size = self._lengths[index] * self._width * self._dtype.itemsize
            self._read(index, data[number * row : number * row + size])
            batch[number, self._lengths[index] :] = 0
        return batch

    def _read(self, index: int, place: memoryview) -> None:
        file, done, checksum = self._files[self._numbers[index]], 0, 0
        try:
            file.seek(self._starts[index])
            while done < len(place) and (more := file.readinto(place[done : done + _READ_BYTES])):
                checksum = crc32(place[done : done + more], checksum)
                done += more
            damage = "the file ends too early" if done < len(place) else "its checksum is wrong"
        except OSError as error:
            done, damage = -1, f"it cannot be read ({error.strerror})"
        if done < len(place) or checksum != self._checksums[index]:
            self._raise_damaged(Path(file.name), index, damage)

    def _raise_damaged(self, path: Path, index: int, damage: str) -> None:
        """Removes the table of a damaged shard and raises TalikError."""
        with suppress(OSError):
            path.with_suffix(".json").unlink(missing_ok=True)
        raise TalikError(
            f"the trunk's cache is damaged: example {index + 1}, at byte {self._starts[index]:,}: {damage}",
            where=path,
            remedy="Continue the run (talik resume RUN) or start it again: the file is computed again.",
        )

    def __enter__(self) -> CachedStates:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()  # an open file cannot be removed on Windows
