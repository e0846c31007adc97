"""Encodes plain text: begin token, text, end token."""

from __future__ import annotations

import re
from array import array

from talik.data.messages import Document
from talik.data.reading.rows import RowError
from talik.data.templates.encoding import Text
from talik.data.templates.template import Template


def document_ids(document: Document, template: Template, quoted: re.Pattern[str] | None) -> array[int]:
    """The token ids of a document, with the begin token where the tokenizer adds one, and the end token.

    Args:
        document: The text; all of its tokens are trained.
        template: Its tokenizer's.
        quoted: Matches control tokens that are encoded as ordinary text; None: they are control tokens.

    Raises:
        RowError: The tokenizer has no end token, or cannot encode the text.
    """
    tokenizer = template.tokenizer
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if end is None:
        raise RowError("no end token", "the tokenizer has no end token (eos_token) to end a document with")
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
