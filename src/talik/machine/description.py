"""Described machines: a YAML file, or a GPU of the table. Assumed values are listed as notes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from talik.base.errors import UsageError, numbered_list
from talik.base.files import format_bytes, parse_size
from talik.machine.gpus import GPUS, find_gpu

GIB = 1 << 30
FALLBACK = "RTX 3060 12GB"  # the slowest GPU of the table with tensor cores for bf16
REMEDY = "`talik machine --save FILE` writes this computer's description: every field, to be changed."


def _bytes(value: Any) -> int:
    try:
        return parse_size(value)
    except UsageError as error:
        raise ValueError(error) from None


def _device(name: str) -> str:
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps", "xpu") or (":" in name and not number.isdigit()):
        raise ValueError("no device: cpu, cuda, mps or xpu, or one of several, as in cuda:1")
    return name


Size = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]
Rate = Annotated[FiniteFloat, Field(gt=0)]
Speed = Annotated[
    FiniteFloat,
    BeforeValidator(lambda value: _bytes(value.removesuffix("/s")) if isinstance(value, str) else value),
    Field(gt=0),
]


class GivenRates(BaseModel):
    """Rates in FLOP/s and bytes/s; bytes/s may also be written as "936 GB/s"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    matmul: dict[Literal["fp32", "bf16"], Rate] = {}
    copy_: Speed | None = Field(default=None, alias="copy")
    to_device: Speed | None = None
    disk_read: Speed | None = None
    disk_write: Speed | None = None


class Description(BaseModel):
    """The fields of a file that describes a machine; device and memory are required."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    device: Annotated[str, AfterValidator(_device)]
    processor: str | None = None
    threads: int | None = Field(default=None, ge=1)
    memory: Annotated[Size, Field(gt=0)]
    free: Size | None = None
    ram: Size | None = None
    ram_free: Size | None = None
    disk_free: Size | None = None
    compute_capability: tuple[int, int] | None = None
    rates: GivenRates = GivenRates()

    @model_validator(mode="after")
    def _consistent(self) -> Description:
        """Reports all contradictions between fields at once; each field by itself has been checked before."""
        wrong = []
        if self.free is not None and self.free > self.memory:
            wrong.append("free: is more than memory")
        if self.ram is not None and self.ram_free is not None and self.ram_free > self.ram:
            wrong.append("ram_free: is more than ram")
        if self.device == "cpu" and self.ram not in (None, self.memory):
            wrong.append("ram: a CPU's memory is the RAM: leave out ram, or write the same")
        if wrong:
            raise ValueError("\n  ".join(wrong))
        return self


def described_fields(name_or_file: str) -> dict[str, Any]:
    """The fields of a `Machine`, including `rates` and `notes`, for a GPU of the table or from a file."""
    gpu = find_gpu(name_or_file)
    if gpu is not None:
        given = Description(name=gpu, device="cuda", processor=gpu, memory=GPUS[gpu].memory << 20)
    else:
        given = _read(Path(name_or_file))
    fields = given.model_dump(exclude_none=True, exclude={"rates"})
    rates = given.rates.model_dump(exclude_none=True, by_alias=True)
    notes = _said("assumed", _fill(fields, _likely(given)))
    notes += complete_rates(rates, fields["device"], fields["processor"], fields["threads"])
    known = _known(fields["device"], fields["processor"])
    if known is not None:
        fields.setdefault("compute_capability", GPUS[known].capability)
    fields |= {"rates": rates, "notes": tuple(notes)}
    return {"name": Path(name_or_file).stem, "disk_free": None, "compute_capability": None, **fields}


def complete_rates(rates: dict[str, Any], device: str, processor: str, threads: int) -> list[str]:
    """Fills in missing fields of `Rates` from a known GPU or an ordinary one; returns notes about them."""
    known, notes = _known(device, processor), []
    if known is not None:
        source = f"the table's peaks ({GPUS[known].source})"
        notes += _said(source, _fill(rates, _rates_of(known)))
    return notes + _said("rates assumed", _fill(rates, _likely_rates(device, threads)))


def _known(device: str, processor: str) -> str | None:
    return None if device == "cpu" else find_gpu(processor)


def _said(what: str, fields: list[str]) -> list[str]:
    return [f"{what}: {', '.join(fields)}"] if fields else []


def _likely(given: Description) -> dict[str, Any]:
    """Defaults for unspecified fields: 1/8 of memory (at most 1 GiB) is assumed to be in use."""
    on_cpu = given.device == "cpu"
    free = given.memory - min(given.memory // 8, GIB) if given.free is None else given.free
    ram = given.ram or (given.memory if on_cpu else max(16 * GIB, given.memory))
    ram_free = free if on_cpu else ram - min(ram // 8, GIB)
    return {"processor": "unknown", "threads": 4, "free": free, "ram": ram, "ram_free": ram_free}


def _likely_rates(device: str, threads: int) -> dict[str, Any]:
    """Rates of an ordinary machine: two channels of DDR4, a SATA disk, 50 GFLOP/s per thread."""
    disk = {"disk_read": 0.5e9, "disk_write": 0.3e9}
    if device != "cpu":
        return {**_rates_of(FALLBACK), **disk}
    matmul = dict.fromkeys(("fp32", "bf16"), 50e9 * threads)
    return {"matmul": matmul, "copy": 25e9, "to_device": 25e9, **disk}


def _rates_of(name: str) -> dict[str, Any]:
    """The rates of a GPU of the table, in FLOP/s and bytes/s."""
    gpu = GPUS[name]
    return {
        "matmul": {"fp32": gpu.fp32 * 1e12, "bf16": gpu.bf16 * 1e12},
        "copy": gpu.bandwidth * 1e9,
        "to_device": gpu.pcie * 1e9,
    }


def _fill(given: dict[str, Any], likely: dict[str, Any]) -> list[str]:
    """Fills in missing fields; returns notes about them."""
    added = []
    for name, value in likely.items():
        if isinstance(value, dict):
            added += _fill(given.setdefault(name, {}), value)
        elif name not in given:
            given[name] = value
            added.append(f"{name} {_in_words(name, value)}")
    return added


def _in_words(name: str, value: Any) -> str:
    if name in ("free", "ram", "ram_free"):
        return format_bytes(value)
    if isinstance(value, float):
        unit = "FLOP" if name in ("fp32", "bf16") else "B"
        return f"{value / 1e12:.4g} T{unit}/s" if value >= 1e12 else f"{value / 1e9:.4g} G{unit}/s"
    return str(value)


def _read(path: Path) -> Description:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"is not YAML in UTF-8: {error}", where=path, remedy=REMEDY) from None
    except OSError as error:
        table = f"GPUs that are known by name: {', '.join(GPUS)}.\n  {REMEDY}"
        problem = f"is neither a GPU of the table nor a readable file: {error.strerror}"
        raise UsageError(problem, where=path, remedy=table) from None
    if not isinstance(fields, dict):
        raise UsageError("holds no fields", where=path, remedy=REMEDY)
    try:
        return Description.model_validate({str(name): value for name, value in fields.items()})
    except ValidationError as error:
        problems = [_problem(one) for one in error.errors()]
        raise UsageError(numbered_list(problems), where=path, remedy=REMEDY) from None


def _problem(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    words = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{field}: is missing"
    if error["type"] == "extra_forbidden":
        return f"{field}: there is no such field"
    return f"{field}: {error['input']!r}: {words[0].lower()}{words[1:]}" if field else words
