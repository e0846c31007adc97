"""What the trunk hands on, one vector per token, unpadded, in one file that any epoch reads in any order.

A folder named by its key holds `hidden.bin` (tokens x hidden, in the order of the examples) and
`manifest.json`, which is written last. The key covers everything that the numbers depend on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from talik.data.labels import Example
from talik.errors import ChainError, TalikError
from talik.files import file_fingerprint, fingerprint, finished_folder, need_room, read_json, write_json
from talik.model.chain import Chain
from talik.model.checkpoint import tensor_bytes
from talik.recipe import Plan


class Cache:
    """A finished cache. Examples are named by their index in the data."""

    def __init__(self, folder: Path, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype) -> None:
        self._file = (folder / "hidden.bin").open("rb", buffering=0)
        self._hidden_size, self._dtype = hidden_size, dtype
        self._starts = [0, *accumulate(lengths)]

    def read(self, indices: Sequence[int]) -> Float[Tensor, "batch sequence hidden"]:
        """The hidden states of these examples, right-padded with zeros, on the CPU."""
        lengths = [self._starts[i + 1] - self._starts[i] for i in indices]
        batch = torch.zeros(len(indices), max(lengths), self._hidden_size, dtype=self._dtype)
        width = self._hidden_size * self._dtype.itemsize
        for row, index, length in zip(batch, indices, lengths, strict=True):
            self._file.seek(self._starts[index] * width)
            place = tensor_bytes(row[:length])
            if self._file.readinto(place) != len(place):
                raise TalikError("the trunk's cache is shorter than it was", where=self._file.name)
        return batch

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # an open file cannot be removed on Windows


class CacheWriter:
    """A cache that is being made: each example is written once, in any order."""

    def __init__(self, folder: Path, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype) -> None:
        self._width = hidden_size * dtype.itemsize
        self._starts = [0, *accumulate(lengths)]
        self._file = (folder / "hidden.bin").open("wb")
        self._file.truncate(self._starts[-1] * self._width)

    def write(self, index: int, hidden: Float[Tensor, "sequence hidden"]) -> None:
        """Takes what the trunk hands on for one example."""
        data = tensor_bytes(hidden)
        expected = (self._starts[index + 1] - self._starts[index]) * self._width
        if len(data) != expected:
            raise ChainError(f"the trunk hands on {len(data)} bytes for an example, not {expected}")
        self._file.seek(self._starts[index] * self._width)
        self._file.write(data)

    def close(self) -> None:
        self._file.close()


def cache_key(chain: Chain, cut: int, examples: Sequence[Example], plan: Plan) -> str:
    """Names everything that what the trunk hands on depends on: tokens, their order, weights, kernels."""
    config = chain.model.config
    facts = (
        f"cut {cut}; {chain.dtype}; {chain.handed_on(cut)}; {config._attn_implementation}; {plan.device}; "
        f"threads {plan.threads}; batch {plan.trunk_batch_tokens}; torch {torch.__version__}; "
        f"transformers {transformers.__version__}"
    )
    tokens = (example.input_ids.tobytes() for example in examples)
    trunk = {"embeddings", *(f"layer {i}" for i in range(cut))}
    weights = (
        f"{name} {fingerprint(tensor_bytes(tensor))}"
        for name, tensor in chain.model.state_dict(keep_vars=True).items()
        if chain.parts.part(name) in trunk
    )
    return fingerprint(facts, config.to_json_string(), *tokens, *weights)


def open_cache(root: Path, key: str, lengths: Sequence[int], chain: Chain, cut: int) -> Cache | None:
    """The finished cache with this key, if there is one whose bytes are what its manifest says."""
    folder = root / key
    if not (folder / "manifest.json").is_file():
        return None
    manifest = read_json(folder / "manifest.json")
    if file_fingerprint(folder / "hidden.bin") != manifest["fingerprint"]:
        shutil.rmtree(folder)
        return None
    return Cache(folder, lengths, chain.hidden_size, chain.handed_on(cut))


@contextmanager
def new_cache(root: Path, key: str, lengths: Sequence[int], chain: Chain, cut: int) -> Iterator[CacheWriter]:
    """A cache that appears under its key once it is complete; nothing stays of one that is not."""
    dtype = chain.handed_on(cut)
    size = sum(lengths) * chain.hidden_size * dtype.itemsize
    need_room(root, size, "the trunk's cache")
    with finished_folder(root / key) as folder:
        writer = CacheWriter(folder, lengths, chain.hidden_size, dtype)
        try:
            yield writer
        finally:
            writer.close()
        write_json(
            folder / "manifest.json",
            {
                "tokens": sum(lengths),
                "bytes": size,
                "made": time.strftime("%Y-%m-%dT%H:%M:%S"),
                "model": getattr(chain.model.config, "name_or_path", ""),
                "fingerprint": file_fingerprint(folder / "hidden.bin"),
            },
        )
