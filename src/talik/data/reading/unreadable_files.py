"""Recognises files without rows (archives, pictures, models) and text that is not UTF-8.

The error says what the file is, only where that is certain or likely, and how to convert it.
"""

from __future__ import annotations

import re

from talik.base.errors import DataError
from talik.data.reading.rows import Place

AS_TEXT = "Save the rows as JSON lines, CSV or Parquet."
# The first bytes of files that hold no rows -> the kind of file, and what to do.
_BINARY = {
    b"PK\x03\x04": ("an Excel or zip file", "Unpack it, or save the sheet as CSV in UTF-8."),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word file", "Save it as CSV in UTF-8."),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it."),
    b"BZh": ("a bzip2 file", "Unpack it: bunzip2 FILE"),
    b"Rar!": ("a RAR archive", "Unpack it."),
    b"SQLite format 3\x00": ("an SQLite database", "Export the table as CSV."),
    b"%PDF": ("a PDF file", "Extract its text first."),
    b"\x93NUMPY": ("a NumPy array", AS_TEXT),
    b"\x80\x02": ("a pickle, which can run code when it is read", AS_TEXT),
    b"\x80\x03": ("a pickle, which can run code when it is read", AS_TEXT),
    b"\x80\x04": ("a pickle, which can run code when it is read", AS_TEXT),
    b"\x80\x05": ("a pickle, which can run code when it is read", AS_TEXT),
    b"FEA1": ("a Feather file of version 1", "Write it again as Parquet."),
    b"ORC": ("an ORC file", AS_TEXT),
    b"Obj\x01": ("an Avro file", AS_TEXT),
    b"GGUF": ("a GGUF model", "Name the model first, then the data."),
    b"\x89PNG": ("an image", AS_TEXT),
    b"\xff\xd8\xff": ("an image", AS_TEXT),
    b"version https://git-lfs": ("a Git LFS pointer in place of the data", "Fetch the data: git lfs pull"),
    b"<!DOCTYPE": ("an HTML page", "It may be an error page in place of a download: get the file again."),
    b"<!doctype": ("an HTML page", "It may be an error page in place of a download: get the file again."),
    b"<html": ("an HTML page", "It may be an error page in place of a download: get the file again."),
}
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}
_RUNS = re.compile(r"[^\x00-\x7f]{2,}")
_CANDIDATES = ("GB18030", "Big5", "Shift_JIS", "EUC-KR", "windows-1251", "windows-1252")
_NAMES = {"GB18030": "GB18030 (GBK)", "windows-1252": "Windows-1252", "windows-1251": "Windows-1251"}


def check_head(head: bytes, name: str) -> None:
    """Checks the first bytes of a file.

    Raises:
        DataError: The file is of a kind without rows, or is UTF-16 or UTF-32 text.
    """
    for start, (kind, remedy) in _BINARY.items():
        if head.startswith(start):
            raise DataError(f"this is {kind}", where=name, remedy=remedy)
    if encoding := _utf16_or_32(head):
        raise DataError(
            f"the file is not UTF-8; it looks like {encoding.rstrip('LBE')}",
            where=Place(name, 1),
            remedy=_iconv(encoding, name),
        )


def _utf16_or_32(head: bytes) -> str | None:
    """Recognises UTF-16 and UTF-32 by the byte order mark or by the zero bytes of ASCII characters."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    start = head[:1000]
    if len(start) >= 4 and b"\0" in start:
        odd, even = start[1::2].count(0), start[::2].count(0)
        if odd > len(start) // 8 and even == 0:
            return "UTF-16LE"
        if even > len(start) // 8 and odd == 0:
            return "UTF-16BE"
    return None


def not_utf8(block: bytes, at: int, start: Place, offset: int) -> DataError:
    """Returns the error for a block that is not UTF-8, with the likely encoding.

    Args:
        block: Whole lines of the file.
        at: The position in the block of the first byte that is not UTF-8.
        start: The place of the block's first line.
        offset: The position of that byte in the file.
    """
    line = start.line + block.count(b"\n", 0, at)
    problem = f"the file is not UTF-8: byte {block[at]:#04x} at offset {offset:,}"
    encoding = _guess(block)
    if encoding is not None:
        problem += f"; it looks like {_NAMES.get(encoding, encoding)}"
    remedy = _iconv(encoding, start.file) if encoding else "Save the file again as UTF-8."
    return DataError(problem, where=Place(start.file, line), remedy=remedy)


def _iconv(encoding: str, name: str) -> str:
    """Returns the remedy with the command that converts a file to UTF-8."""
    command = f'iconv -f {encoding} -t UTF-8 "{name}" > converted'
    return f"Save the file again as UTF-8: {command}"


def _guess(block: bytes) -> str | None:
    """Returns the encoding in which the non-ASCII bytes are most likely letters, if one is plausible."""
    found = {name: _plausibility(block, name) for name in _CANDIDATES}
    best = max(found, key=lambda name: found[name])
    return best if found[best] > 0.6 else None


def _plausibility(block: bytes, encoding: str) -> float:
    """Returns the share of common letters of the encoding's languages among the non-ASCII characters."""
    try:
        text = block[: 1 << 16].decode(encoding, errors="strict" if len(block) <= 1 << 16 else "ignore")
    except (UnicodeDecodeError, LookupError):
        return 0.0
    non_ascii = [c for c in text if ord(c) > 127]
    if not non_ascii or (len(non_ascii) < 4 and encoding == "windows-1251"):  # fewer letters than a word has
        return 0.0
    common = sum(_is_common(c, encoding) for c in non_ascii) / len(non_ascii)
    if not encoding.startswith("windows"):  # these characters form words and rarely stand alone among letters
        common *= sum(len(run) for run in _RUNS.findall(text)) / len(non_ascii)
    if encoding in ("windows-1251", "windows-1252"):  # accented letters among ASCII, or Cyrillic words
        ascii_letters = sum(c.isascii() and c.isalpha() for c in text)
        latin = encoding == "windows-1252"
        return common if (ascii_letters > 2 * len(non_ascii)) == latin else common * 0.5
    return common


def _is_common(character: str, encoding: str) -> bool:
    code = ord(character)
    if encoding == "windows-1252":
        return character in "äöüÄÖÜßéèêëàâáãåçñíìîïóòôõøúùûæœŒÉÈÀÇÑØÅÆ«»“”‘’„–—…°§€·¿¡"
    if encoding == "windows-1251":
        return "А" <= character <= "я" or character in "ёЁ«»—"
    if encoding == "Shift_JIS":
        return 0x3040 <= code <= 0x30FF or 0x4E00 <= code <= 0x9FFF or 0x3000 <= code <= 0x303F
    if encoding == "EUC-KR":
        return 0xAC00 <= code <= 0xD7A3
    if encoding == "Big5":
        return 0x4E00 <= code <= 0x9FFF or 0xFF00 <= code <= 0xFFEF or 0x3000 <= code <= 0x303F
    # Level 1 of GB 2312 has nearly all characters of common texts.
    raw = character.encode("gb2312", errors="ignore")
    return len(raw) == 2 and (0xB0 <= raw[0] <= 0xD7 or raw[0] in (0xA1, 0xA3))
