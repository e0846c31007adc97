"""Finds text that was decoded with the wrong encoding, by reversing the wrong decoding."""

from __future__ import annotations

import re

_QUOTES = "“”‘’–—…»«‚„"  # in correct text they also occur next to capital letters and accents
_SIGNS = "€ƒ†‡ˆ‰Š‹ŒŽ•˜™š›œžŸ\u0080-\u009f\u00a0-\u00aa\u00ac-\u00ba\u00bc-\u00bf"
_ANY = _SIGNS + _QUOTES  # the bytes 0x80 to 0xbf in Windows-1252
_LATIN = re.compile(
    f"[ÂÃ][{_SIGNS}]|[ÂÃÄÅ][{_ANY}](?=[a-z])|(?<=[a-z])[ÂÃÄÅ][{_ANY}]|[ÐÑÎÏ][{_ANY}][ÐÑÎÏ][{_ANY}]"
    f"|[à-ï](?:[{_SIGNS}][{_ANY}]|[{_QUOTES}][{_SIGNS}])|ð[{_ANY}]{{3}}"
)
# A Russian letter becomes two of these; a single pair may be intended.
_CYRILLIC = re.compile("(?:[РС][\u0400-\u040f\u0450-\u045f\u0490\u0491‚„…†‡€‰‹‘’“”•–—™›\u00a0-\u00bfРС]){2,}")
_CHINESE = re.compile("[\u4e00-\u9fff]{6,}")
_KNOWN = re.compile("锟斤拷|烫烫烫|屯屯屯|ï»¿")
_LETTERS = re.compile(r"[^\W\d_]")


def misread(text: str) -> str | None:
    """Returns the first part of a text that was decoded with the wrong encoding, or None.

    It finds UTF-8 that was decoded as Windows-1252, Latin-1, Windows-1251 or GBK: encoded again, such a part
    is valid UTF-8 of another text.
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
    """Encodes a part and decodes it as UTF-8; None if it is not valid UTF-8 or not plausible in prose."""
    try:
        meant = part.encode(encoding).decode("utf-8")
    except UnicodeError:
        return None
    plausible = _LETTERS.search(meant) or any(0x2000 <= ord(c) <= 0x27BF or ord(c) > 0xFFFF for c in meant)
    return meant if plausible or meant.strip() in ("£", "§", "°", "«", "»", "¿", "¡", "€", "·", "") else None
