"""Checks the header of a safetensors file by the rules of the format, before anything after it is used.

The file: 8 bytes (little endian) with the length of the header; the header, a JSON object with dtype, shape
and byte range of every tensor; the bytes (https://github.com/huggingface/safetensors#format). Names are
unique, a range is as long as shape and dtype require, and ranges follow each other without gaps up to the end
of the file. Everything that the format's own library refuses is refused, and also duplicate names, of which
it uses the last, and unknown fields, which it ignores.
"""

from __future__ import annotations

import json
import math
import os
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from talik.base.errors import SourceError

LONGEST = 100_000_000  # bytes of a header, by the format
ITEM_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 1),
}
Range = tuple[str, tuple[int, ...], int, int]  # dtype, shape, first byte in the file, size in bytes
_REMEDY = "The file is damaged, or its download was cut off: get it again."


def read_ranges(file: Path) -> dict[str, Range]:
    """The dtype, shape and bytes of every tensor of a safetensors file.

    Raises:
        SourceError: The header breaks a rule of the format; the error names the tensor and the rule.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(LONGEST, size - 8):
            problem = f"is not a safetensors file: it has {size:,} bytes and names a header of {length:,}"
            raise SourceError(problem, where=file, remedy=_REMEDY)
        header = _parsed(stream.read(length), file)
    _check_metadata(header.pop("__metadata__", {}), file)
    found = {name: _range(name, entry, file) for name, entry in header.items()}
    _check_contiguous(found, size - 8 - length, file)
    return {
        name: (dtype, shape, 8 + length + start, end - start)
        for name, (dtype, shape, start, end) in found.items()
    }


def _parsed(raw: bytes, file: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"the name {twice[:200]!r} is given twice")
        return made

    try:  # decoded first, because `json` would also accept UTF-16 and a byte order mark
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_int=_count)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise _broken(f"its header cannot be read ({reason})", file) from None
    if not isinstance(header, dict):
        raise _broken("its header is not a JSON object", file)
    if (halves := next((name for name in header if not _is_text(name)), None)) is not None:
        raise _wrong(halves, "has a name that is not Unicode text", file)
    return header


def _count(digits: str) -> int | str:
    """An integer from 0 to 2^63; any other number stays as written, to be refused and shown."""
    return int(digits) if digits.isdigit() and len(digits) <= 19 and int(digits) < 2**63 else digits


def _is_text(name: str) -> bool:
    """True if a name can be written as UTF-8; JSON can contain halves of surrogate pairs, which cannot."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _check_metadata(metadata: Any, file: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken("its __metadata__ is not an object of strings", file)


def _range(name: str, entry: Any, file: Path) -> Range:
    """The dtype, shape, start and end of one entry of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _wrong(name, "does not have exactly dtype, shape and data_offsets", file)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _wrong(name, f"has the dtype {str(dtype)[:40]!r}, which is not known", file)
    if not _counts(shape):
        raise _wrong(name, f"has the shape {str(shape)[:80]}, which is not a list of sizes", file)
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _wrong(name, f"has the byte range {str(offsets)[:80]}, which is not a byte range", file)
    if any(size >= 2**63 for size in accumulate(filter(None, shape), mul, initial=ITEM_SIZES[dtype])):
        raise _wrong(name, f"has the shape {str(shape)[:80]}, which no memory can hold", file)
    needed = math.prod(shape) * ITEM_SIZES[dtype]
    if offsets[1] - offsets[0] != needed:
        held = offsets[1] - offsets[0]
        raise _wrong(name, f"has {held:,} bytes, and {dtype} of shape {shape} takes {needed:,}", file)
    return dtype, tuple(shape), offsets[0], offsets[1]


def _counts(value: Any) -> bool:
    """True for a list of integers from 0 to 2^63, as `_count` returns them."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_contiguous(found: dict[str, Range], size: int, file: Path) -> None:
    at = 0
    for name, (_, _, start, end) in sorted(found.items(), key=lambda item: item[1][2:]):
        if start != at:
            what = "overlaps the tensor before it" if start < at else "leaves a hole before it"
            raise _wrong(name, f"{what}: it begins at byte {start:,} and not at {at:,}", file)
        at = end
    if at != size:
        problem = f"has {size:,} bytes of tensors, and its header speaks of {at:,}"
        raise SourceError(problem, where=file, remedy=_REMEDY)


def _wrong(name: str, problem: str, file: Path) -> SourceError:
    return _broken(f"tensor {name[:200]!r} {problem}", file)


def _broken(problem: str, file: Path) -> SourceError:
    return SourceError(f"is not a sound safetensors file: {problem}", where=file, remedy=_REMEDY)
