"""What a computer has: measured and kept, described by a file or a name, shown by `talik machine`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml

from talik.base import system
from talik.base.errors import NoRoomError, UsageError
from talik.base.events import Status
from talik.base.files import parse_size
from talik.cli.main import main
from talik.machine import rates as rates_module
from talik.machine.device import choose_device
from talik.machine.gpus import GPUS, find_gpu
from talik.machine.machine import Machine, described_machine, save_machine, this_machine
from talik.machine.rates import matmul_rate

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def nothing_kept(own_home: None) -> None:
    """These tests begin on a machine that has not been measured."""
    rates_module.kept_file().unlink()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measuring takes no time here; the list says what was measured."""
    done: list[str] = []

    def device(_: torch.device) -> dict[str, Any]:
        done.append("device")
        return {"matmul": {"fp32": 1e11, "bf16": 2e9}, "copy": 2e10, "to_device": 2e10}

    def disk(_: Path) -> dict[str, float]:
        done.append("disk")
        return {"disk_read": 1.5e9, "disk_write": 4e8}

    monkeypatch.setattr(rates_module, "measure_device", device)
    monkeypatch.setattr(rates_module, "measure_disk", disk)
    return done


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `talik machine ARGUMENTS`: exit code, stdout, stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["machine", *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# Measured and kept


def test_rates_are_measured_once(measured: list[str]) -> None:
    said: list[Any] = []
    first = this_machine("cpu", notify=said.append)
    assert measured == ["device", "disk"] and isinstance(said[0], Status) and "machine.json" in said[0].text
    again = this_machine("cpu", notify=said.append)
    assert measured == ["device", "disk"] and len(said) == 1 and again.rates == first.rates
    assert first.measured and first.rates.matmul == {"fp32": 1e11, "bf16": 2e9} and first.notes == ()
    this_machine("cpu", anew=True)
    assert measured == ["device", "disk"] * 2


def test_rates_of_other_threads_processor_or_disk_are_others(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    this_machine("cpu")
    with monkeypatch.context() as patch:
        patch.setattr("torch.get_num_threads", lambda: 77)
        assert this_machine("cpu").threads == 77 and measured[2:] == ["device"]
    with monkeypatch.context() as patch:
        patch.setattr("talik.machine.machine.processor_name", lambda: "another")
        assert this_machine("cpu").processor == "another" and measured[3:] == ["device"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=5, free=2))
        assert this_machine("cpu").disk_free == 2 and measured[4:] == ["disk"]
    this_machine("cpu")
    assert len(measured) == 5, "what was kept before is still kept"


@pytest.mark.parametrize("broken", ["", "[1]", '{"disk 1": 3}', "cut", "number"])
def test_a_broken_file_is_measured_anew(broken: str, measured: list[str]) -> None:
    this_machine("cpu")
    kept = rates_module.kept_file()
    if broken == "cut":
        broken = kept.read_text()[:-40]
    if broken == "number":
        broken = kept.read_text().replace("20000000000.0", '"fast"').replace("400000000.0", "0.0")
    kept.write_text(broken)
    assert this_machine("cpu").rates.copy == 2e10 and len(measured) == 4
    this_machine("cpu")
    assert len(measured) == 4


def test_without_measuring_rates_are_assumed_and_said(measured: list[str]) -> None:
    machine = this_machine("cpu", measure=False)
    assert not machine.measured and measured == [] and not rates_module.kept_file().exists()
    assert machine.rates.matmul["fp32"] > 0 and "rates assumed: fp32 " in machine.notes[0]
    this_machine("cpu")
    assert this_machine("cpu", measure=False).measured


def test_measuring_this_computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "SECONDS", 0.01)
    monkeypatch.setattr(rates_module, "PIECE", 1 << 20)
    folder = tmp_path / "new"
    fields: dict[str, Any] = rates_module.measure_device(torch.device("cpu"))
    fields |= rates_module.measure_disk(folder)
    rates = rates_module.Rates(**fields)
    numbers = [*rates.matmul.values(), rates.copy, rates.to_device, rates.disk_read, rates.disk_write]
    assert all(0 < number < 1e15 for number in numbers) and set(rates.matmul) == {"fp32", "bf16"}
    assert list(folder.iterdir()) == [], "the file is gone"


def test_products_are_made_smaller_where_they_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def slow(a: torch.Tensor, b: torch.Tensor) -> float:
        sizes.append(len(a))
        clock[0] += len(a) ** 3 * 2 / 5e9
        return 0.0

    clock = [0.0]
    monkeypatch.setattr(rates_module, "_product", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert matmul_rate(torch.float32, torch.device("cpu")) == pytest.approx(5e9, rel=1e-6)
    assert max(sizes) == 512 and clock[0] < 1


@pytest.mark.parametrize(("kind", "chosen"), [("cuda", "cuda"), ("mps", "cpu"), (None, "cpu")])
def test_the_device_is_one_that_can_be_planned_for(
    kind: str | None, chosen: str, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = torch.device(kind) if kind else None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert choose_device("auto").type == chosen and choose_device("cpu:0") == torch.device("cpu")
    if found is not None:
        assert choose_device(found.type) == found
        with pytest.raises(UsageError, match="no device"):
            choose_device(f"{found.type}:3")
    if chosen == "cpu":
        said: list[Any] = []
        this_machine(notify=said.append)
        notes = [event.text for event in said if isinstance(event, Status) and event.topic == "note"]
        assert notes == (["runs on mps cannot be planned yet: cpu is used"] if found else [])


def test_a_full_disk_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=1 << 40, free=100 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(NoRoomError, match="measuring the disk"):
        rates_module.measure_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Memory and its limits

LIMITED = """
import resource, sys
from talik.base.system import free_memory, total_memory
limit = 3 << 30
resource.setrlimit(getattr(resource, sys.argv[1]), (limit, limit))
hole = bytearray(1 << 30)
print(free_memory(), total_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce these limits")
@pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_free_is_never_more_than_a_limit_leaves(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, kind], capture_output=True, text=True, check=True)
    free, total = map(int, done.stdout.split())
    assert free <= (3 << 30) - (1 << 30) and total <= 3 << 30
    there = psutil.virtual_memory().available
    assert free > min(1 << 30, there // 2), "not without reason"


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes a cgroup's files: `cgroups("memory/a", "memory.max", "memory.current", ...)`."""
    monkeypatch.setattr(system, "_CGROUPS", tmp_path)
    monkeypatch.setattr(system, "_OWN_CGROUPS", tmp_path / "own")

    def write(own: str, folder: str, **files: object) -> None:
        (tmp_path / "own").write_text(own)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (tmp_path / folder / name.replace("__", ".")).write_text(f"{value}\n")

    return write


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
def test_a_containers_limit_counts(cgroups: Callable[..., None]) -> None:
    mib = 1 << 20
    v1 = {"memory__limit_in_bytes": 600 * mib, "memory__usage_in_bytes": 500 * mib}
    stat = f"cache 1\ninactive_file 7\ntotal_inactive_file {200 * mib}"
    cgroups("9:cpu:/x\n4:memory:/docker/abc\n0::/\n", "memory", **v1, memory__stat=stat)
    assert (system.free_memory(), system.total_memory()) == (300 * mib, 600 * mib), (
        "its name is not seen inside"
    )
    v2 = {"memory__max": "max", "memory__current": 900 * mib, "memory__stat": "inactive_file 0"}
    cgroups("0::/user/run\n", "user/run", **v2)
    assert system.total_memory() == psutil.virtual_memory().total, "no limit"
    stat = f"anon 3\ninactive_file {100 * mib}"
    cgroups("0::/user/run\n", "user", memory__max=400 * mib, memory__current=450 * mib, memory__stat=stat)
    assert (system.free_memory(), system.total_memory()) == (50 * mib, 400 * mib), "of the one around it"


def test_this_machine_says_what_is_there_now(measured: list[str]) -> None:
    machine = this_machine("cpu")
    assert machine.memory == machine.ram == system.total_memory() and machine.device == "cpu"
    assert 0 < machine.free <= machine.memory and machine.compute_capability is None
    assert machine.threads == torch.get_num_threads() and machine.disk_free and machine.name == "this machine"


# Described


def test_a_saved_machine_is_read_back(measured: list[str], tmp_path: Path) -> None:
    machine = this_machine("cpu")
    save_machine(machine, tmp_path / "office.yaml")
    assert described_machine(str(tmp_path / "office.yaml")) == replace(machine, name="office", measured=False)
    gpu = replace(described_machine("A100 40GB"), disk_free=7, device="cuda:1")
    save_machine(gpu, tmp_path / "other")
    assert described_machine(str(tmp_path / "other")) == replace(gpu, notes=())


def described(tmp_path: Path, text: str) -> Machine:
    (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
    return described_machine(str(tmp_path / "m.yaml"))


def test_what_is_left_out_is_assumed_and_said(tmp_path: Path) -> None:
    machine = described(
        tmp_path, "device: cpu\nmemory: 16GB\nthreads: 8\nrates: {disk_read: 2 GB/s, copy: 9.0e+9}"
    )
    assert (machine.memory, machine.ram, machine.name) == (16 * 10**9, 16 * 10**9, "m")
    assert machine.free == machine.ram_free == 16 * 10**9 - (1 << 30) and machine.disk_free is None
    assert (machine.rates.disk_read, machine.rates.copy) == (2e9, 9e9)
    notes = " ".join(machine.notes)
    assert "free 13.9 GiB" in notes and "fp32 400 GFLOP/s" in notes and "disk_write" in notes
    assert not re.search(r"disk_read|copy |threads", notes), "what is written is not assumed"
    assert described(tmp_path, "device: cuda\nmemory: 8GiB").ram == 16 << 30


def test_a_known_gpu_in_a_file_brings_its_rates(tmp_path: Path) -> None:
    text = "device: cuda\nmemory: 20GiB\nprocessor: NVIDIA GeForce RTX 4090\nrates: {matmul: {bf16: 140e12}}"
    machine = described(tmp_path, text)
    assert machine.memory == 20 << 30 and machine.compute_capability == (8, 9)
    assert machine.rates.matmul == {"fp32": 82.6e12, "bf16": 140e12} and machine.rates.copy == 1008e9
    assert any("Ada" in note and "bf16" not in note for note in machine.notes)


WRONG = """
device: gpu
memory: 24 parsecs
threads: 0
colour: red
compute_capability: [8]
rates: {copy: -1, matmul: {fp8: 1.0}, disk_read: .inf}
"""


def test_all_wrong_fields_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        described(tmp_path, WRONG)
    text = str(caught.value)
    for words in (
        "m.yaml: 8 problems",
        "device: 'gpu': no device: cpu, cuda",
        "memory: '24 parsecs': ",
        "24GiB",
        "threads: 0: ",
        "colour: there is no such field",
        "compute_capability",
        "rates.copy: -1: ",
        "rates.matmul.fp8",
        "rates.disk_read: inf: ",
        "--save",
    ):
        assert words in text, (words, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("device: cpu", "memory: is missing"),
        ("memory: 0\ndevice: cpu", "memory: 0: "),
        (
            "device: cpu\nmemory: 8GB\nram: 9GB\nfree: 9GB",
            "(?s)free: is more than memory.*ram: a CPU's memory",
        ),
        ("device: cuda\nmemory: 8GB\nram: 9GB\nram_free: 10GB", "ram_free: is more than ram"),
        ("just words", "holds no fields"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        described(tmp_path, text)


def test_an_unknown_name_lists_the_table(tmp_path: Path) -> None:
    for name in ("RTX 9999", str(tmp_path / "none.yaml"), str(tmp_path), "x" * 500):
        with pytest.raises(UsageError) as caught:
            described_machine(name)
        assert all(gpu in str(caught.value) for gpu in GPUS)


def test_the_tables_gpus() -> None:
    for name, gpu in GPUS.items():
        machine = described_machine(name)
        assert machine.name == name and not machine.measured and machine.memory == gpu.memory << 20
        assert machine.compute_capability == gpu.capability and any(gpu.source in n for n in machine.notes)
        # of dense products: twice to sixteen times the fp32 rate; with sparsity it would be more
        assert machine.rates.matmul["bf16"] <= 16 * machine.rates.matmul["fp32"]
        assert machine.free < machine.memory <= machine.ram
    assert find_gpu("nvidia geforce rtx-4090") == find_gpu("4090") == "RTX 4090"
    assert find_gpu("NVIDIA GeForce RTX 4090 Laptop GPU") is None and find_gpu("A100") is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1536, 1536),
        ("1536", 1536),
        ("24GiB", 24 << 30),
        (" 24 gb ", 24 * 10**9),
        ("1.5TiB", 3 << 39),
        ("0.1 GB", 10**8),
        ("7B", 7),
        ("1" + "0" * 40, 10**40),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "24 G", "1e9", "24GB free", "1,5GB", True, 1e30, float("nan")]
)
def test_no_size(text: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{text!r} is not a size")) as caught:
        parse_size(text)
    assert "24GiB" in str(caught.value) and "24GB" in str(caught.value)


# The command


def test_the_command_shows_one_screen(run: Run, measured: list[str]) -> None:
    code, out, err = run("--device", "cpu")
    assert code == 0 and err.startswith("machine ") and len(out.splitlines()) < 24
    for words in (
        "100.0 GFLOP/s",
        "2.0 GFLOP/s",
        "20.0 GB/s",
        "1.50 GB/s",
        "0.40 GB/s",
        "GiB",
        "machine.json",
    ):
        assert words in out, words
    assert run("--device", "cpu")[2] == "" and len(measured) == 2
    assert run("--device", "cpu", "--measure")[0] == 0 and len(measured) == 4


def test_the_command_for_programs_and_files(run: Run, measured: list[str], tmp_path: Path) -> None:
    file = tmp_path / "folder" / "mine.yaml"
    code, out, _ = run("--device", "cpu", "--json", "--save", file)
    value = json.loads(out)
    assert code == 0 and value["measured"] and value["rates"]["disk_write"] == 4e8
    assert yaml.safe_load(file.read_text())["memory"] == value["memory"]
    code, out, err = run("--machine", file, "--json")
    assert (code, err) == (0, "") and json.loads(out) == {**value, "name": "mine", "measured": False}
    code, out, _ = run("--machine", "rtx 4090")
    assert code == 0 and "165,200.0 GFLOP/s" in out and "assumed: " in out and "whitepaper" in out


def test_what_cannot_be_used_is_said(run: Run, measured: list[str], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("device: cpu\nmemory: much\n")
    for arguments, words in (
        (("--machine", tmp_path / "wrong.yaml"), "memory: 'much'"),
        (("--machine", "no such"), "RTX 4090"),
        (("--machine", "T4", "--measure"), "--measure"),
        (("--device", "toaster"), "toaster"),
        (("--machine", "T4", "--save", tmp_path), "cannot be used"),
        (("--machine", "T4", "--save", tmp_path / "wrong.yaml" / "x"), "cannot be used"),
    ):
        code, _, err = run(*arguments)
        assert code == 2 and err.startswith("error") and words in err, arguments
    assert measured == []
