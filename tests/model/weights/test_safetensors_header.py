"""Headers of safetensors files: refused where the format's own library refuses them, else read alike.

Four things that the library takes are refused as well: see `STRICTER`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from talik.base.errors import SourceError
from talik.model.weights.safetensors_file import DTYPES, NAMES, read_header, tensor_bytes

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 5),
    "scalar": torch.tensor(7),
}


def change(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["b"].update(fields)


def shift(by: int) -> Callable[[dict[str, Any]], Any]:
    return lambda h: h["b"].update(data_offsets=[at + by for at in h["b"]["data_offsets"]])


MUTATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "sound": lambda header: None,
    "shifted": shift(4),
    "shifted back": shift(-4),
    "negative": change(data_offsets=[-8, 0]),
    "backwards": change(data_offsets=[32, 24]),
    "too small": lambda h: h["b"].update(
        data_offsets=[h["b"]["data_offsets"][0], h["b"]["data_offsets"][1] - 2]
    ),
    "too large": lambda h: h["b"].update(
        data_offsets=[h["b"]["data_offsets"][0], h["b"]["data_offsets"][1] + 2]
    ),
    "another dtype": change(dtype="F32"),
    "a dtype of the same size": change(dtype="F16"),
    "an unknown dtype": change(dtype="F12"),
    "dtype null": change(dtype=None),
    "another shape": change(shape=[2, 3]),
    "the same size": change(shape=[2, 2]),
    "shape of floats": change(shape=[4.0]),
    "shape of texts": change(shape=["4"]),
    "shape null": change(shape=None),
    "shape negative": change(shape=[-4]),
    "shape true": change(shape=[True, 4]),
    "offsets empty": change(data_offsets=[]),
    "offsets of floats": change(data_offsets=[24.0, 32.0]),
    "offsets huge": change(data_offsets=[2**64, 2**64 + 8]),
    "a field more": change(strides=[1]),
    "no shape": lambda header: header["b"].pop("shape"),
    "one missing": lambda header: header.pop("b"),
    "one twice": lambda header: header.update(c=dict(header["b"])),
    "no object": lambda header: header.update(b=5),
    "metadata of numbers": lambda header: header.update(__metadata__={"format": 1}),
    "metadata no object": lambda header: header.update(__metadata__=[]),
    "metadata missing": lambda header: header.pop("__metadata__"),
    "a name of half a letter": lambda header: header.update({"\ud800": header.pop("b")}),
    "a name of a rare letter": lambda header: header.update({"\U0001f600": header.pop("b")}),
    "too large to count": lambda header: header["empty"].update(shape=[2**40, 2**40, 0]),
    "of no elements, and large": lambda header: header["empty"].update(shape=[0, 2**40]),
}
ENTRY = b'{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
TEXTS: dict[str, bytes] = {
    "sound": b'{"a": ' + ENTRY + b"}",
    "blanks around": b' {"a": ' + ENTRY + b"}  \n",
    "letters behind": b'{"a": ' + ENTRY + b"}x",
    "zeros behind": b'{"a": ' + ENTRY + b"}\0",
    "a byte order mark": b"\xef\xbb\xbf" + b'{"a": ' + ENTRY + b"}",
    "UTF-16": (b'{"a": ' + ENTRY + b"}").decode().encode("utf-16"),
    "Latin-1": b'{"\xe4": ' + ENTRY + b"}",
    "minus zero": b'{"a": ' + ENTRY.replace(b"[0", b"[-0") + b"}",
    "a fraction": b'{"a": ' + ENTRY.replace(b"8]", b"8.0]") + b"}",
    "an exponent": b'{"a": ' + ENTRY.replace(b"8]", b"8e0]") + b"}",
    "5,000 digits": b'{"a": ' + ENTRY.replace(b"8]", b"8" * 5000 + b"]") + b"}",
    "NaN": b'{"a": ' + ENTRY.replace(b"8]", b"NaN]") + b"}",
    "a field twice": b'{"a": {"dtype": "F32", ' + ENTRY[1:] + b"}",
    "a field of NaN": b'{"a": {"x": NaN, ' + ENTRY[1:] + b"}",
    "a field of lists": b'{"a": {"x": ' + b"[" * 200 + b"]" * 200 + b", " + ENTRY[1:] + b"}",
    "a name twice": b'{"a": ' + ENTRY + b', "a": ' + ENTRY + b"}",
    "metadata twice": b'{"__metadata__": {}, "__metadata__": {}, "a": ' + ENTRY + b"}",
    "metadata null": b'{"__metadata__": null, "a": ' + ENTRY + b"}",
    "a list for an entry": b'{"a": ["F32", [2], [0, 8]]}',
    "null": b"null",
    "nothing": b"",
    "a list": b"[]",
    "nested": b"[" * 100_000,
}
# The library takes an entry as a list, null as metadata, the last of two entries of a name, and skips fields.
STRICTER = {"a field more", "a name twice", "metadata null", "a list for an entry"}


def written(path: Path, header: Any, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def sound(path: Path) -> tuple[dict[str, Any], bytes]:
    save_file(TENSORS, path, {"format": "pt"})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def assert_read_as_the_library_reads_it(file: Path, *, stricter: bool = False) -> None:
    """Refused where the library refuses it, or for a dtype; else the same names, shapes and bytes."""
    try:
        expected = dict(deserialize(file.read_bytes()))
    except SafetensorError:
        expected = None
    read = DTYPES.keys() >= {tensor["dtype"] for tensor in (expected or {}).values()}
    if expected is None or stricter or not read:
        with pytest.raises(SourceError) as caught:
            read_header(file)
        assert str(file) in str(caught.value) and len(str(caught.value)) < len(str(file)) + 500
        return
    found = {name: entry.read() for name, entry in read_header(file).items()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert list(tensor.shape) == expected[name]["shape"]
        assert bytes(tensor_bytes(tensor)) == bytes(expected[name]["data"])
        assert NAMES[tensor.dtype] == expected[name]["dtype"]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_header_is_refused_where_the_library_refuses_it(name: str, tmp_path: Path) -> None:
    header, data = sound(tmp_path / "file")
    MUTATIONS[name](header)
    file = written(tmp_path / "file", header, data)
    assert_read_as_the_library_reads_it(file, stricter=name in STRICTER)


@pytest.mark.parametrize("name", TEXTS)
def test_a_header_s_text_is_refused_where_the_library_refuses_it(name: str, tmp_path: Path) -> None:
    file = written(tmp_path / "file", TEXTS[name], bytes(range(8)))
    assert_read_as_the_library_reads_it(file, stricter=name in STRICTER)


NUMBERS = st.integers(-9, 40) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30])
VALUES = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | NUMBERS
FIELDS = {
    "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "U8", "BOOL", "F12", "f32"]) | VALUES,
    "shape": st.lists(NUMBERS, max_size=3) | st.lists(VALUES, max_size=2) | VALUES,
    "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | st.lists(VALUES, max_size=3) | VALUES,
}
CHANGES = st.sampled_from(sorted(FIELDS)).flatmap(lambda field: st.tuples(st.just(field), FIELDS[field]))


@given(st.lists(st.tuples(st.sampled_from(sorted(TENSORS)), CHANGES), max_size=3), st.integers(-8, 8))
@settings(max_examples=300, deadline=None)
def test_any_change_is_refused_where_the_library_refuses_it(
    folder: Path, changes: list[tuple[str, tuple[str, Any]]], longer: int
) -> None:
    header, data = sound(folder / "file")
    for name, (field, value) in changes:
        header[name][field] = value
    data = data + bytes(longer) if longer > 0 else data[: len(data) + longer]
    assert_read_as_the_library_reads_it(written(folder / "file", header, data))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_byte_of_a_header_may_be_another(folder: Path, data: st.DataObject) -> None:
    sound(folder / "file")
    raw = bytearray((folder / "file").read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    (folder / "file").write_bytes(raw)
    assert_read_as_the_library_reads_it(folder / "file", stricter=_has_other_fields(bytes(raw)))


def _has_other_fields(raw: bytes) -> bool:
    """Whether the library would skip a field: one letter more is a field that nobody knows."""
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        deserialize(raw)
    except (ValueError, SafetensorError):
        return False
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    return any(not isinstance(e, dict) or len(e) != 3 for e in entries)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


def test_the_tensor_and_the_rule_are_named(tmp_path: Path) -> None:
    rules = {
        "shifted": "tensor 'b' leaves a hole before it: it begins at byte",
        "one twice": "tensor 'c' overlaps the tensor before it",
        "too small": "tensor 'b' has 6 bytes, and BF16 of shape [4] takes 8",
        "an unknown dtype": "tensor 'b' has the dtype 'F12'",
        "shape of texts": "tensor 'b' has the shape ['4']",
        "negative": "tensor 'b' has the byte range ['-8', 0]",
        "no shape": "tensor 'b' does not have exactly dtype, shape and data_offsets",
    }
    for name, rule in rules.items():
        header, data = sound(tmp_path / "file")
        MUTATIONS[name](header)
        with pytest.raises(SourceError) as caught:
            read_header(written(tmp_path / "file", header, data))
        assert rule in str(caught.value)


def test_a_dtype_of_the_format_that_is_not_read_is_named(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    with pytest.raises(SourceError, match="'a' has the dtype F8_E4M3, which Talik does not read"):
        read_header(written(tmp_path / "file", header, bytes(4)))


def test_a_header_of_many_tensors_is_read_at_once(tmp_path: Path) -> None:
    count = 30_000
    entry = {"dtype": "U8", "shape": [1]}
    header = {f"layers.{i}.weight": {**entry, "data_offsets": [i, i + 1]} for i in range(count)}
    file = written(tmp_path / "file", header, bytes(count))
    began = time.process_time()
    assert len(read_header(file)) == count
    assert time.process_time() - began < 3


def test_a_shape_of_many_dimensions_takes_no_time(tmp_path: Path) -> None:
    shape = [2**62] * 200_000
    header = {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}
    began = time.process_time()
    with pytest.raises(SourceError, match="which no memory can hold"):
        read_header(written(tmp_path / "file", header, b"1"))
    assert time.process_time() - began < 3


def test_reading_headers_needs_neither_torch_nor_numpy() -> None:
    program = (
        "import sys, talik.model.weights.safetensors_header\n"
        "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_tensor_is_read_into_memory_of_its_own_size_only(tmp_path: Path) -> None:
    sound(tmp_path / "file")
    entry = read_header(tmp_path / "file")["b"]
    for size in (entry.size - 2, entry.size + 2):
        with pytest.raises(SourceError, match=rf"has 8 bytes, and is read into {size}"):
            entry.read_into(memoryview(bytearray(size)))
    assert torch.equal(entry.part(1, 2).read(), TENSORS["b"][1:3])
    for first, count in ((3, 2), (-1, 1)):
        with pytest.raises(SourceError, match="are not in the tensor"):
            entry.part(first, count)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"null", "is not a JSON object"),
        (b"[1]", "is not a JSON object"),
        (b"{", "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "'a' does not have exactly dtype"),
        (b'{"x": {}, "x": {}}', "'x' is given twice"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_header_that_is_none(header: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=said):
        read_header(written(tmp_path / "file", header, b""))


@pytest.mark.parametrize("data", [b"", b"\0" * 4, b"\xff" * 8 + b"{}", (10**6).to_bytes(8, "little") + b"{}"])
def test_a_length_that_no_header_has(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(SourceError, match="is not a safetensors file"):
        read_header(tmp_path / "file")


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    header, data = sound(tmp_path / "file")
    with pytest.raises(SourceError, match="its header speaks of"):
        read_header(written(tmp_path / "file", header, data + b"\0"))
