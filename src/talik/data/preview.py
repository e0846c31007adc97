"""Renders examples with their masks, token by token, as text and as HTML.

Trained and masked tokens can be told apart without colour, too.
"""

from __future__ import annotations

import html
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from talik.data.examples import Example

LONGEST_CHARACTER = 8  # the most tokens of one character, or of a few characters that share tokens
BETWEEN = "\u00b7"  # the code pages of Windows consoles have it, too
GUTTER = {True: "+ ", False: "  "}
# The styles alternate, so that tokens can be told apart.
STYLES = {True: ("bold green", "bold cyan"), False: ("dim", "")}
JOINERS = "\u200c\u200d"  # they occur in Persian words and in emoji
BINS = 10
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>What is trained</title><style>
body {{ font-family: sans-serif; margin: 2em; }}
pre {{ white-space: pre-wrap; line-height: 1.8; }}
span {{ border: 1px solid #ccc; }}
.trained {{ background: #cfc; color: #000; font-weight: bold; border-bottom: 3px solid #080; }}
.masked {{ color: #666; }}
</style></head><body>
<p><span class="trained">trained</span> <span class="masked">masked</span>: every box is one token, or the
tokens of one character.</p>
{sections}
</body></html>
"""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One token, or several tokens that only together are complete characters."""

    text: str
    ids: tuple[int, ...]
    trained: bool


def preview_text(example: Example, tokenizer: Any) -> Text:
    """Renders an example for a terminal.

    Lines that start with "+" are trained, as in a diff; the others are masked. A middle dot separates two
    tokens.
    """
    text = Text(f"{_header(example)}; lines marked + are trained, {BETWEEN} is between tokens\n", style="")
    at_start, before = True, False
    for count, piece in enumerate(_pieces(example, tokenizer)):
        if piece.trained != before and not at_start:
            text.append("\n")
            at_start = True
        if not at_start:
            text.append(BETWEEN, style="dim")
        for part in _visible(piece.text).splitlines(keepends=True):
            if at_start:
                text.append(GUTTER[piece.trained], style=STYLES[piece.trained][0])
            text.append(part, style=STYLES[piece.trained][count % 2])
            at_start = part.endswith("\n")
        before = piece.trained
    return text


def preview_html(examples: Sequence[Example], tokenizer: Any) -> str:
    """Renders examples as a self-contained HTML page; hovering over a token shows its id."""
    return PAGE.format(sections=sections(examples, tokenizer))


def sections(examples: Sequence[Example], tokenizer: Any) -> str:
    """Renders each example as an HTML heading and its tokens."""
    return "\n".join(_section(example, tokenizer) for example in examples)


def length_histogram(lengths: Sequence[int], width: int = 40) -> str:
    """Renders the distribution of lengths as bars of at most `width` characters, with percentiles."""
    if not lengths:
        return "no examples"
    ordered = sorted(lengths)
    ranges = length_ranges(lengths)
    digits, most = len(f"{ranges[-1][1]:,}"), max(count for _, _, count in ranges)
    lines: list[str] = []
    for low, high, count in ranges:
        bar = "#" * -(-count * width // most)
        lines.append(f"{low:>{digits},} - {high:>{digits},} | {bar:<{width}} {count:,}")
    shares = ", ".join(
        f"{share} % up to {ordered[-(-len(ordered) * share // 100) - 1]:,}" for share in (50, 90, 99)
    )
    return "\n".join([*lines, f"{len(ordered):,} examples: {shares}, longest {ordered[-1]:,} tokens"])


def length_ranges(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Counts lengths in at most BINS ranges; returns the first length, last length and count of each."""
    if not lengths:
        return []
    step = -(-max(lengths) // BINS)
    counts = [0] * -(-max(lengths) // step)
    for length in lengths:
        counts[max(length - 1, 0) // step] += 1
    return [(at * step + 1, (at + 1) * step, count) for at, count in enumerate(counts)]


def _header(example: Example) -> str:
    return f"{example.place}  {example.length:,} tokens, {example.trained_tokens:,} trained"


def _section(example: Example, tokenizer: Any) -> str:
    tokens: list[str] = []
    for piece in _pieces(example, tokenizer):
        kind = "trained" if piece.trained else "masked"
        ids = " ".join(map(str, piece.ids))
        tokens.append(f'<span class="{kind}" title="{ids}">{html.escape(_visible(piece.text))}</span>')
    return f"<h2>{html.escape(_header(example))}</h2>\n<pre>{''.join(tokens)}</pre>"


def _pieces(example: Example, tokenizer: Any) -> Iterator[_Piece]:
    """Yields the pieces of an example.

    Each piece is decoded together with the piece before it, which keeps the spaces between words.
    """
    ids = list(example.input_ids)
    trained = [
        flag for span in example.spans for flag in itertools.repeat(span.trained, span.stop - span.start)
    ]
    anchor = start = 0
    for stop in range(1, len(ids) + 1):
        before, whole = _decode(tokenizer, ids[anchor:start]), _decode(tokenizer, ids[anchor:stop])
        text = whole.removeprefix(before) if whole.startswith(before) else _decode(tokenizer, ids[start:stop])
        if text.endswith("\ufffd") and stop - start < LONGEST_CHARACTER and stop < len(ids):
            continue
        shown = text or " ".join(tokenizer.convert_ids_to_tokens(ids[start:stop]))
        yield _Piece(shown, tuple(ids[start:stop]), any(trained[start:stop]))
        anchor, start = start, stop


def _decode(tokenizer: Any, ids: list[int]) -> str:
    if not ids:
        return ""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _visible(text: str) -> str:
    """Writes a line break as \\n and a line break, and escapes backslashes and invisible characters."""
    shown: list[str] = []
    for character in text:
        escaped = character.encode("unicode_escape").decode("ascii")
        if character == "\n":
            shown.append("\\n\n")
        elif character in JOINERS or character == " ":
            shown.append(character)
        elif character == "\\" or unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs"):
            shown.append(escaped)
        else:
            shown.append(character)
    return "".join(shown)
