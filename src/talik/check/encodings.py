"""Finds text that was decoded with a wrong encoding, by undoing it."""

from __future__ import annotations

import re

_QUOTES = "“”‘’–—…»«‚„"  # also next to capital letters and accents in correct text
_SIGNS = "€ƒ†‡ˆ‰Š‹ŒŽ•˜™š›œžŸ\u0080-\u009f\u00a0-\u00aa\u00ac-\u00ba\u00bc-\u00bf"
_ANY = _SIGNS + _QUOTES  # what the bytes 0x80 to 0xbf are in Windows-1252
_LATIN = re.compile(
    f"[ÂÃ][{_SIGNS}]|[ÂÃÄÅ][{_ANY}](?=[a-z])|(?<=[a-z])[ÂÃÄÅ][{_ANY}]|[ÐÑÎÏ][{_ANY}][ÐÑÎÏ][{_ANY}]"
    f"|[à-ï](?:[{_SIGNS}][{_ANY}]|[{_QUOTES}][{_SIGNS}])|ð[{_ANY}]{{3}}"
)
# A letter of Russian is two of these; one such pair alone may be meant.
_CYRILLIC = re.compile("(?:[РС][\u0400-\u040f\u0450-\u045f\u0490\u0491‚„…†‡€‰‹‘’“”•–—™›\u00a0-\u00bfРС]){2,}")
_CHINESE = re.compile("[\u4e00-\u9fff]{6,}")
_KNOWN = re.compile("锟斤拷|烫烫烫|屯屯屯|ï»¿")
_LETTERS = re.compile(r"[^\W\d_]")


def misread(text: str) -> str | None:
    """The first part of a text that was read in a wrong encoding, or None.

    UTF-8 that was read as Windows-1252 or Latin-1, as Windows-1251, and as GBK: turned back into its bytes, a
    part is UTF-8 of another text.
    """
    if text.isascii():
        return None
    if found := _KNOWN.search(text):
        return found[0]
    for found in _LATIN.finditer(text):
        if _undone(found[0], "cp1252") or _undone(found[0], "latin-1"):
            return found[0]
    for found in _CYRILLIC.finditer(text):
        if (meant := _undone(found[0], "cp1251")) and re.fullmatch("[\u0400-\u04ff]+", meant):
            return found[0]
    for found in _CHINESE.finditer(text):
        if (meant := _undone(found[0], "gbk")) and _CHINESE.match(meant + meant):
            return found[0]
    return None


def _undone(part: str, encoding: str) -> str | None:
    """The bytes of a part, read as UTF-8; None if they are not UTF-8, or not a letter or sign of prose."""
    try:
        meant = part.encode(encoding).decode("utf-8")
    except UnicodeError:
        return None
    plausible = _LETTERS.search(meant) or any(0x2000 <= ord(c) <= 0x27BF or ord(c) > 0xFFFF for c in meant)
    return meant if plausible or meant.strip() in ("£", "§", "°", "«", "»", "¿", "¡", "€", "·", "") else None
