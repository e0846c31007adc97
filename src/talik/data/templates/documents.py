"""Encodes plain text: begin token, text, end token."""

from __future__ import annotations

import re
from array import array

from talik.data.messages import Document
from talik.data.reading.rows import RowError
from talik.data.templates.encoding import Text
from talik.data.templates.template import Template


def document_ids(document: Document, template: Template, quoted: re.Pattern[str] | None) -> array[int]:
    """Encodes a document, with the begin token if the tokenizer adds one, and with the end token.

    Args:
        document: The document.
        template: The template of the tokenizer.
        quoted: Matches the control tokens to encode as ordinary text; None: all are encoded as control
            tokens.

    Raises:
        RowError: The tokenizer has no end token, or cannot encode the text.
    """
    tokenizer = template.tokenizer
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if end is None:
        raise RowError(
            "no end token", "the tokenizer has no end token (eos_token), which a document must end with"
        )
    ranges = [found.span() for found in quoted.finditer(document.text)] if quoted else []
    (encoded,) = template.encoder.encode([Text(document.text, (), ranges)])
    if isinstance(encoded, RowError):
        raise encoded
    ids = array("i")
    if begin is not None and tokenizer("").input_ids[:1] == [begin]:
        ids.append(begin)
    ids.extend(encoded.ids)
    ids.append(end)
    return ids
