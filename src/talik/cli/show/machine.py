"""A machine on one screen."""

from __future__ import annotations

from talik.base.files import format_bytes
from talik.base.system import home_folder
from talik.machine.machine import HERE, Machine
from talik.machine.rates import kept_file


def machine_text(machine: Machine) -> str:
    """A machine as a table."""
    rates, on_cpu = machine.rates, machine.device == "cpu"
    where = f" in {home_folder()}" if machine.name == HERE else ""
    disk = "unknown" if machine.disk_free is None else f"{format_bytes(machine.disk_free)} free{where}"
    capability = ".".join(map(str, machine.compute_capability or ()))
    if machine.measured:
        source = f"measured, kept in {kept_file()}"
    else:
        source = "as described" if machine.name != HERE else "not measured"
    rows = [
        ("machine", machine.name),
        ("device", machine.device + (f", compute capability {capability}" if capability else "")),
        ("processor", machine.processor),
        ("threads", f"{machine.threads}"),
        ("memory", f"{format_bytes(machine.memory)}, {format_bytes(machine.free)} of it free"),
        *(
            []
            if on_cpu
            else [("RAM", f"{format_bytes(machine.ram)}, {format_bytes(machine.ram_free)} of it free")]
        ),
        ("disk", disk),
        ("rates", source),
        *((f"  {dtype} matrices", f"{rate / 1e9:,.1f} GFLOP/s") for dtype, rate in rates.matmul.items()),
        ("  copy in memory", f"{rates.copy / 1e9:,.1f} GB/s, read plus written"),
        *([] if on_cpu else [("  copy to device", f"{rates.to_device / 1e9:,.1f} GB/s")]),
        ("  disk reads", f"{rates.disk_read / 1e9:,.2f} GB/s"),
        ("  disk writes", f"{rates.disk_write / 1e9:,.2f} GB/s, fsync included"),
        *(("note", note) for note in machine.notes),
    ]
    return "\n".join(f"{name:<17} {text}" for name, text in rows)
