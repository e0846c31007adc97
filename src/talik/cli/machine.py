"""`talik machine`: the memory and speed of this computer, or of one that is described."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from talik.base.errors import UsageError
from talik.cli.options import arg, options, parse
from talik.cli.show import console


def command(argv: list[str]) -> None:
    wanted = options(
        "Machine",
        ("machine", arg(str | None, "describe another: a YAML file, or a GPU's name as in 'RTX 4090'"), None),
        ("device", arg(str, "auto, cpu, cuda, cuda:1, mps, ..."), "auto"),
        ("measure", arg(bool, "measure anew, whatever is kept"), False),
        ("save", arg(str | None, "write it as YAML to this file, for --machine"), None),
        ("json", arg(bool, "print it as JSON"), False),
    )
    parsed = parse("machine", wanted, argv, "What this computer has, and how fast it is; measured once.")
    from talik.cli.show.machine import machine_text
    from talik.cli.show.watch import Watch
    from talik.machine.machine import described_machine, save_machine, this_machine

    if parsed.machine and (parsed.measure or parsed.device != "auto"):
        raise UsageError("--machine describes another computer: leave out --measure and --device")
    with Watch() as watch:
        if parsed.machine:
            machine = described_machine(parsed.machine)
        else:
            machine = this_machine(parsed.device, anew=parsed.measure, notify=watch)
    if parsed.json:
        console.result_json(dataclasses.asdict(machine))
    else:
        console.result(machine_text(machine))
    if parsed.save:
        save_machine(machine, Path(parsed.save))
        console.said("written", parsed.save)
