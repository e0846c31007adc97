"""Examples with their masks, as text and HTML.

Shows the tokens that the model reads and which of them are trained, also without colour.
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

LONGEST_CHARACTER = 8  # most tokens of one character, or of a few that share tokens
BETWEEN = "\u00b7"  # also in code pages of Windows consoles
GUTTER = {True: "+ ", False: "  "}
STYLES = {True: ("bold green", "bold cyan"), False: ("dim", "")}  # alternate between tokens
JOINERS = "\u200c\u200d"  # inside Persian words and emoji
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
    """One token, or tokens that together form whole characters."""

    text: str
    ids: tuple[int, ...]
    trained: bool


def preview_text(example: Example, tokenizer: Any) -> Text:
    """An example for a terminal: lines with "+" are trained, as in a diff; the others are masked.

    A middle dot separates two tokens. Only the signs mark trained tokens if there is no colour.
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
    """The examples as one HTML page without other files; hovering over a token shows its id."""
    return PAGE.format(sections=sections(examples, tokenizer))


def sections(examples: Sequence[Example], tokenizer: Any) -> str:
    """Each example as a heading and its tokens, in HTML."""
    return "\n".join(_section(example, tokenizer) for example in examples)


def length_histogram(lengths: Sequence[int], width: int = 40) -> str:
    """The number of examples by length, as bars at most `width` wide, and percentiles."""
    if not lengths:
        return "no examples"
    ordered = sorted(lengths)
    ranges = length_ranges(lengths)
    digits, most = len(f"{ranges[-1][1]:,}"), max(count for _, _, count in ranges)
    lines = []
    for low, high, count in ranges:
        bar = "#" * -(-count * width // most)
        lines.append(f"{low:>{digits},} - {high:>{digits},} | {bar:<{width}} {count:,}")
    shares = ", ".join(
        f"{share} % up to {ordered[-(-len(ordered) * share // 100) - 1]:,}" for share in (50, 90, 99)
    )
    return "\n".join([*lines, f"{len(ordered):,} examples: {shares}, longest {ordered[-1]:,} tokens"])


def length_ranges(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """At most BINS ranges of lengths: first and last length, and the number of examples."""
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
    tokens = []
    for piece in _pieces(example, tokenizer):
        kind = "trained" if piece.trained else "masked"
        ids = " ".join(map(str, piece.ids))
        tokens.append(f'<span class="{kind}" title="{ids}">{html.escape(_visible(piece.text))}</span>')
    return f"<h2>{html.escape(_header(example))}</h2>\n<pre>{''.join(tokens)}</pre>"


def _pieces(example: Example, tokenizer: Any) -> Iterator[_Piece]:
    """Decodes tokens to whole characters, together with the previous piece, which keeps spaces between
    words.
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
    """Line breaks as \\n and a line break; invisible characters and the backslash as escapes."""
    shown = []
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
