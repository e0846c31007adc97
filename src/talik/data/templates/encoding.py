"""Text -> token ids, each with the characters that it covers: all that masks need of a tokenizer.

A fast tokenizer says which characters a token covers. A slow one does not: then its ids are compared with
those of the same tokenizer converted to a fast one, text by text; where they differ, the text up to each
boundary is tokenised by itself, and a boundary inside a token is an error, never a guess.
"""

from __future__ import annotations

import copy
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
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
        boundaries: Characters at which masks begin or end, ascending.
        quoted: Ranges of control tokens that somebody quotes: they are encoded as ordinary text.
    """

    text: str
    boundaries: Sequence[int] = ()
    quoted: Sequence[Range] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids (32-bit) and, for each token, the characters that it covers."""

    ids: array[int]
    offsets: Sequence[Range]


@runtime_checkable
class Encoder(Protocol):
    """Encodes texts without adding special tokens: the chat template has written them."""

    def encode(self, texts: Sequence[Text]) -> list[Encoded | RowError]: ...


def encoder_of(tokenizer: Any) -> Encoder:
    """The encoder for a tokenizer of Transformers.

    Raises:
        UsageError: The tokenizer has no method that gives token ids.
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
    """A tokenizer of the `tokenizers` library.

    It is used without its post-processor: that one adds special tokens and takes blanks out of the offsets.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = _plain(backend)
        self._text_only: Tokenizer | None = None

    def encode(self, texts: Sequence[Text]) -> list[Encoded | RowError]:
        simple = [text.text for text in texts if not text.quoted]
        encoded = iter(self._backend.encode_batch(simple, add_special_tokens=False) if simple else ())
        return [self._with_quotes(text) if text.quoted else _encoded(next(encoded)) for text in texts]

    def _with_quotes(self, text: Text) -> Encoded | RowError:
        """Encodes a text whose `quoted` ranges are ordinary text, piece by piece."""
        if self._text_only is None:
            self._text_only = _without_added_tokens(self._backend)
        ids, offsets, at = array("i"), [], 0
        for start, stop in (*text.quoted, (len(text.text), len(text.text))):
            for backend, first, last in ((self._backend, at, start), (self._text_only, start, stop)):
                piece = _piece(backend, text.text[first:last], inside=first > 0)
                ids.extend(piece.ids)
                offsets += [(first + a, first + b) for a, b in piece.offsets]
            token = self._backend.token_to_id(text.text[start:stop])
            if stop > start and token in ids[-len(text.text[start:stop]) :] and offsets[-1] == (start, stop):
                return RowError("control token", f"{text.text[start:stop]!r} cannot be written as text")
            at = stop
        return Encoded(ids, offsets)


def _encoded(encoding: Any) -> Encoded:
    return Encoded(array("i", encoding.ids), encoding.offsets)


def _piece(backend: Tokenizer, text: str, *, inside: bool) -> Encoded:
    """Encodes a piece of a text; `inside`: without the blank that SentencePiece puts at a text's start."""
    if not text:
        return Encoded(array("i"), [])
    if inside:
        after = backend.encode("\n" + text, add_special_tokens=False)
        first = next((i for i, (_, stop) in enumerate(after.offsets) if stop > 1), len(after.ids))
        if all(start >= 1 for start, _ in after.offsets[first:]):
            return Encoded(array("i", after.ids[first:]), [(a - 1, b - 1) for a, b in after.offsets[first:]])
    return _encoded(backend.encode(text, add_special_tokens=False))


def _plain(backend: Tokenizer) -> Tokenizer:
    backend = copy.deepcopy(backend)
    backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    backend.no_padding()
    backend.no_truncation()
    return backend


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), "added_tokens": []}))


class SlowEncoder:
    """A tokenizer that gives ids alone."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast = _converted(tokenizer)

    def encode(self, texts: Sequence[Text]) -> list[Encoded | RowError]:
        return [self._one(text) for text in texts]

    def _one(self, text: Text) -> Encoded | RowError:
        if text.quoted:
            return RowError(
                "control token", "a control token cannot be quoted with a tokenizer without offsets"
            )
        ids = self._ids(text.text)
        if self._fast is not None:
            (fast,) = self._fast.encode([text])
            if isinstance(fast, Encoded) and fast.ids == ids:
                return fast
        return self._by_prefixes(text, ids)

    def _ids(self, text: str) -> array[int]:
        return array("i", self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _by_prefixes(self, text: Text, ids: array[int]) -> Encoded | RowError:
        """Each token gets the characters between the two boundaries around it."""
        offsets: list[Range] = []
        before = 0
        for boundary in sorted({*text.boundaries, len(text.text)} - {0}):
            prefix = self._ids(text.text[:boundary])
            if prefix != ids[: len(prefix)]:
                return RowError(
                    _NO_OFFSETS,
                    f"the tokenizer ({type(self._tokenizer).__name__}) does not say which characters a token "
                    f"covers, and one lies across the boundary at character {boundary:,}",
                )
            offsets += [(before, boundary)] * (len(prefix) - len(offsets))
            before = boundary
        return Encoded(ids, offsets)


def _converted(tokenizer: Any) -> FastEncoder | None:
    """The same tokenizer as a fast one, where Transformers can convert it."""
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    try:
        return FastEncoder(convert_slow_tokenizer(tokenizer))
    except Exception:  # each converter fails in its own way; ids are compared and prefixes tokenised then
        return None
