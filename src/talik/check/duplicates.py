"""Rows that are there twice: exactly, nearly, with another answer, or in training and evaluation both.

Only hashes are kept, 8 bytes for each row and for each band. Near duplicates are found by MinHash (Broder,
"On the resemblance and containment of documents", 1997): rows whose sets of three consecutive words agree in
a band of the signature are compared by the whole signature.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from talik.check.texts import normalised
from talik.data.messages import Conversation, Document
from talik.data.rows import Place

HASHES, BANDS = 64, 8
LEAST_WORDS = 12  # shorter texts are alike by chance
ALIKE = 0.85  # share of equal MinHash values, an estimate of the Jaccard similarity
_WORDS = re.compile(r"\w", re.UNICODE)
_SPLIT = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
_random = np.random.default_rng(7)
_FACTORS = _random.integers(1, 2**63, HASHES, dtype=np.uint64) | np.uint64(1)
_TERMS = _random.integers(0, 2**63, HASHES, dtype=np.uint64)


@dataclass(slots=True)
class Duplicates:
    """What was seen so far."""

    rows: dict[int, Place] = field(default_factory=dict)
    questions: dict[int, tuple[Place, int]] = field(default_factory=dict)
    evaluated: dict[int, Place] = field(default_factory=dict)
    bands: dict[tuple[int, int], int] = field(default_factory=dict)
    signatures: list[np.ndarray] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def add(
        self, row: Conversation | Document, *, evaluation: bool = False
    ) -> Iterator[tuple[str, str, str]]:
        """Takes a row; yields kind, severity and text of what it repeats."""
        question, whole = _parts(row)
        whole_hash, question_hash = _hash(whole), _hash(question)
        if evaluation:
            self.evaluated.setdefault(question_hash, row.place)
            if question and question_hash in self.questions:
                first = self.questions[question_hash][0]
                yield (
                    "in training and evaluation",
                    "problem",
                    f"the question stands in the training data: {first}",
                )
            return
        if whole_hash in self.rows:
            yield "duplicate", "problem", f"the row is the same as {self.rows[whole_hash]}"
            return
        self.rows[whole_hash] = row.place
        if question:
            first = self.questions.setdefault(question_hash, (row.place, whole_hash))
            if first[1] != whole_hash:
                yield "another answer", "note", f"the question has another answer in {first[0]}"
        if (like := self._near(whole, row.place)) is not None:
            yield "near duplicate", "problem", f"the row is nearly the same as {like}"

    def _near(self, text: str, place: Place) -> Place | None:
        words = _SPLIT.findall(text)
        if len(words) < LEAST_WORDS:
            return None
        signature = _signature(words)
        number, like = len(self.signatures), None
        for band, part in enumerate(signature.reshape(BANDS, -1)):
            key = (band, int.from_bytes(hashlib.blake2b(part.tobytes(), digest_size=8).digest(), "little"))
            other = self.bands.setdefault(key, number)
            if other != number and like is None and (self.signatures[other] == signature).mean() >= ALIKE:
                like = self.places[other]
        self.signatures.append(signature)
        self.places.append(place)
        return like


def _parts(row: Conversation | Document) -> tuple[str, str]:
    """What is asked (all before the last answer), and the whole row, both normalised."""
    if isinstance(row, Document):
        return "", normalised(row.text)
    texts = [normalised(message.content) for message in row.messages]
    calls = [repr(message.tool_calls) for message in row.messages if message.tool_calls]
    return "\n".join(texts[:-1]), "\n".join([*texts, *calls])


def _hash(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def _signature(words: list[str]) -> np.ndarray:
    """The least hash of all triples of words under each of HASHES functions."""
    hashes = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], np.uint64)
    triples = hashes[:-2] * np.uint64(31 * 31) + hashes[1:-1] * np.uint64(31) + hashes[2:]
    mixed = (triples[:, None] * _FACTORS + _TERMS) >> np.uint64(32)
    return mixed.min(0).astype(np.uint32)
