"""Finds pairs of similar texts with MinHash signatures.

A signature holds the smallest hash of a text's pairs of consecutive words under each of HASHES functions. The
share of equal values in two signatures estimates the Jaccard similarity of the two sets of pairs (Broder, "On
the resemblance and containment of documents", 1997). Only signatures that agree in a whole band are compared,
so the work grows linearly with the number of texts.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HASHES, BANDS = 64, 16
LEAST_WORDS = 10  # shorter texts are often similar by chance
MOST_WORDS = 5000  # the rest of a longer text is not compared
BLOCK = 1 << 16  # pairs that are compared at a time
# A word, or one character of a script without blanks between words; symbols count as words.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
    r"|[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
    r"|[^\w\s.,;:!?'\"。，、；：！？“”‘’…]"
    r"|(?<=\d)[.,](?=\d)"
)
_random = np.random.default_rng(7)
_FACTORS = _random.integers(1, 2**63, HASHES, dtype=np.uint64) | np.uint64(1)
_TERMS = _random.integers(0, 2**63, HASHES, dtype=np.uint64)


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without the punctuation of sentences."""
    return _WORD.findall(text.casefold())


def pair_hashes(words: list[str]) -> np.ndarray:
    """Returns the hashes of all pairs of consecutive words as a uint64 array."""
    words = words[:MOST_WORDS]
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], np.uint64)
    return hashes[:-1] * np.uint64(0x9E3779B97F4A7C15) + hashes[1:]


def common_pairs(texts: Iterable[list[str]], share: float = 0.02, least: int = 10) -> np.ndarray:
    """Finds the pairs of words that occur in many texts, such as a prompt that every row repeats.

    Args:
        texts: The words of each text of a sample.
        share: The least share of the texts that a common pair is in.
        least: The least number of texts that a common pair is in.

    Returns:
        The sorted hashes of the common pairs, uint64.
    """
    counted: Counter[int] = Counter()
    total = 0
    for words in texts:
        total += 1
        counted.update(np.unique(pair_hashes(words)).tolist())
    limit = max(least, share * total)
    return np.array(sorted(pair for pair, count in counted.items() if count >= limit), np.uint64)


@dataclass(slots=True)
class Signatures:
    """The signatures of texts, with 16 bits for each hash function.

    Attributes:
        common: The hashes of common pairs, which are ignored.
        rows: The number of the row of each signature.
        values: The signatures as bytes.
    """

    common: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    rows: array[int] = field(default_factory=lambda: array("q"))
    values: bytearray = field(default_factory=bytearray)

    def add(self, row: int, words: list[str]) -> None:
        """Adds the signature of a text, unless it is short or consists mainly of common pairs."""
        if len(words) < LEAST_WORDS:
            return
        pairs = pair_hashes(words)
        if len(self.common):
            pairs = pairs[~np.isin(pairs, self.common)]
        if len(pairs) < LEAST_WORDS - 1:
            return
        mixed = (pairs[:, None] * _FACTORS + _TERMS) >> np.uint64(32)
        self.rows.append(row)
        self.values += mixed.min(0).astype(np.uint16).tobytes()

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the row numbers, ascending, and the signatures of shape (rows, HASHES)."""
        values = np.frombuffer(bytes(self.values), np.uint16).reshape(-1, HASHES)
        return np.array(self.rows, np.int64), values

    def alike(self, least: float) -> Iterator[tuple[int, int]]:
        """Yields each pair of rows (earlier, later) with at least this share of equal hashes once."""
        rows, values = self.table()
        found: set[tuple[int, int]] = set()
        for band in np.split(values, BANDS, axis=1):
            for earlier, later in _neighbours(np.ascontiguousarray(band).view(np.uint64).ravel()):
                equal = (values[earlier] == values[later]).mean(1) >= least
                found.update(zip(rows[earlier[equal]].tolist(), rows[later[equal]].tolist(), strict=True))
        yield from sorted(found, key=lambda pair: (pair[1], pair[0]))


def _neighbours(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of pairs: each text with the first text and the previous text that have the same key."""
    order, starts = grouped(keys)
    follows = np.flatnonzero(starts != np.arange(len(order)))
    for at in range(0, len(follows), BLOCK):
        block = follows[at : at + BLOCK]
        yield order[starts[block]], order[block]
        further = block[block - 1 != starts[block]]
        yield order[further - 1], order[further]


def grouped(keys: Any) -> tuple[np.ndarray, np.ndarray]:
    """Groups equal keys.

    Returns:
        The indices of the keys in sorted order, and for each position in it the position where its group
        starts.
    """
    order = np.argsort(keys, kind="stable")
    ordered = np.asarray(keys)[order]
    new = np.ones(len(order), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    starts = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    return order, starts
