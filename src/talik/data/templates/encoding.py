"""Encodes text to token ids, each with the range of characters that it covers.

A fast tokenizer gives the characters of each token. A slow one does not, so its ids are compared with those
of the same tokenizer converted to a fast one, for each text. If they differ, the text up to each boundary is
tokenised separately; a boundary inside a token is then an error, not a guess.
"""

from __future__ import annotations

import copy
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from tokenizers import Tokenizer

from talik.base.errors import UsageError
from talik.data.reading.rows import RowError

Range = tuple[int, int]
_NO_OFFSETS = "tokenizer without offsets"


@dataclass(frozen=True, slots=True)
class Text:
    """A text to encode.

    Attributes:
        text: The characters.
        boundaries: The positions at which masks begin or end, ascending.
        quoted: The ranges of control tokens that are encoded as ordinary text.
    """

    text: str
    boundaries: Sequence[int] = ()
    quoted: Sequence[Range] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids (32-bit), and for each token the range of characters that it covers."""

    ids: array[int]
    offsets: Sequence[Range]


@runtime_checkable
class Encoder(Protocol):
    """Encodes texts without adding special tokens, which the chat template has written already."""

    def encode(self, texts: Sequence[Text]) -> list[Encoded | RowError]:
        """Encodes texts; a text that cannot be encoded gives a RowError."""
        ...


def encoder_of(tokenizer: Any) -> Encoder:
    """Returns the encoder for a tokenizer of Transformers.

    Raises:
        UsageError: The tokenizer cannot encode text.
    """
    if getattr(tokenizer, "is_fast", False):
        return FastEncoder(tokenizer.backend_tokenizer)
    if not callable(tokenizer):
        raise UsageError(
            f"The tokenizer ({type(tokenizer).__name__}) cannot encode text.",
            remedy="Use a model whose folder has a tokenizer.json.",
        )
    return SlowEncoder(tokenizer)


class FastEncoder:
    """Encodes with a tokenizer of the `tokenizers` library.

    Its post-processor is removed, because it adds special tokens and removes blanks from the offsets.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = _plain(backend)
        self._text_only: Tokenizer | None = None

    def encode(self, texts: Sequence[Text]) -> list[Encoded | RowError]:
        """Encodes texts; a text that cannot be encoded gives a RowError."""
        simple = [text.text for text in texts if not text.quoted]
        encoded = iter(self._backend.encode_batch(simple, add_special_tokens=False) if simple else ())
        return [self._with_quotes(text) if text.quoted else _encoded(next(encoded)) for text in texts]

    def _with_quotes(self, text: Text) -> Encoded | RowError:
        """Encodes a text piece by piece, with the `quoted` ranges as ordinary text."""
        if self._text_only is None:
            self._text_only = _without_added_tokens(self._backend)
        ids, offsets, at = array("i"), list[Range](), 0
        for start, stop in (*text.quoted, (len(text.text), len(text.text))):
            for backend, first, last in ((self._backend, at, start), (self._text_only, start, stop)):
                piece = _piece(backend, text.text[first:last], inside=first > 0)
                ids.extend(piece.ids)
                offsets += [(first + a, first + b) for a, b in piece.offsets]
            token = self._backend.token_to_id(text.text[start:stop])
            if stop > start and token in ids[-len(text.text[start:stop]) :] and offsets[-1] == (start, stop):
                return RowError("control token", f"{text.text[start:stop]!r} cannot be encoded as text")
            at = stop
        return Encoded(ids, offsets)


def _encoded(encoding: Any) -> Encoded:
    return Encoded(array("i", encoding.ids), encoding.offsets)


def _piece(backend: Tokenizer, text: str, *, inside: bool) -> Encoded:
    """Encodes a piece of a text; `inside`: without the blank that SentencePiece adds at the start."""
    if not text:
        return Encoded(array("i"), [])
    if inside:
        after = backend.encode("\n" + text, add_special_tokens=False)
        first = next((i for i, (_, stop) in enumerate(after.offsets) if stop > 1), len(after.ids))
        if all(start >= 1 for start, _ in after.offsets[first:]):
            return Encoded(array("i", after.ids[first:]), [(a - 1, b - 1) for a, b in after.offsets[first:]])
    return _encoded(backend.encode(text, add_special_tokens=False))


def _plain(backend: Tokenizer) -> Tokenizer:
    """Copies a tokenizer without post-processor, padding and truncation."""
    backend = copy.deepcopy(backend)
    backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    backend.no_padding()
    backend.no_truncation()
    return backend


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), "added_tokens": []}))


class SlowEncoder:
    """Encodes with a tokenizer that gives ids without character ranges."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast = _converted(tokenizer)

    def encode(self, texts: Sequence[Text]) -> list[Encoded | RowError]:
        """Encodes texts; a text that cannot be encoded gives a RowError."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: Text) -> Encoded | RowError:
        if text.quoted:
            problem = "a control token cannot be encoded as ordinary text with a tokenizer without offsets"
            return RowError("control token", problem)
        ids = self._ids(text.text)
        if self._fast is not None:
            (fast,) = self._fast.encode([text])
            if isinstance(fast, Encoded) and fast.ids == ids:
                return fast
        return self._by_prefixes(text, ids)

    def _ids(self, text: str) -> array[int]:
        return array("i", self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _by_prefixes(self, text: Text, ids: array[int]) -> Encoded | RowError:
        """Encodes a text; each token gets the range between the two boundaries around it."""
        offsets: list[Range] = []
        before = 0
        for boundary in sorted({*text.boundaries, len(text.text)} - {0}):
            prefix = self._ids(text.text[:boundary])
            if prefix != ids[: len(prefix)]:
                return RowError(
                    _NO_OFFSETS,
                    f"the tokenizer ({type(self._tokenizer).__name__}) gives no character offsets, and "
                    f"a token crosses the boundary at character {boundary:,}",
                )
            offsets += [(before, boundary)] * (len(prefix) - len(offsets))
            before = boundary
        return Encoded(ids, offsets)


def _converted(tokenizer: Any) -> FastEncoder | None:
    """Converts a tokenizer to a fast one, if Transformers can."""
    converters = import_module("transformers.convert_slow_tokenizer")
    try:
        return FastEncoder(converters.convert_slow_tokenizer(tokenizer))
    except Exception:  # the converters raise errors of many kinds; the encoder then tokenises prefixes
        return None
