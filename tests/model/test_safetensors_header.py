"""Headers of safetensors files: refused where the format's own library refuses them, else read alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from talik.errors import SourceError
from talik.model.checkpoint import read_header

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
}


def written(path: Path, header: Any, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def sound(path: Path) -> tuple[dict[str, Any], bytes]:
    save_file(TENSORS, path, {"format": "pt"})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_header_is_refused_where_the_library_refuses_it(name: str, tmp_path: Path) -> None:
    header, data = sound(tmp_path / "file")
    MUTATIONS[name](header)
    file = written(tmp_path / "file", header, data)
    try:
        with safe_open(file, "pt") as opened:
            expected = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError):
        expected = None
    if expected is None:
        with pytest.raises(SourceError, match=r"'b'|header|'c'"):
            read_header(file)
        return
    found = {key: entry.read() for key, entry in read_header(file).items()}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == found[key].dtype and torch.equal(tensor, found[key])


def test_most_mutations_are_refused() -> None:
    assert len(MUTATIONS) > 25


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"null", "is no JSON object"),
        (b"[1]", "is no JSON object"),
        (b"{", "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read"),
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
    with pytest.raises(SourceError, match="is no safetensors file"):
        read_header(tmp_path / "file")


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    header, data = sound(tmp_path / "file")
    with pytest.raises(SourceError, match="its header speaks of"):
        read_header(written(tmp_path / "file", header, data + b"\0"))
