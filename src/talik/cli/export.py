"""`talik export`: a run's result as a plain Transformers folder."""

from __future__ import annotations

from talik.base.files import format_bytes
from talik.cli.options import (
    arg,
    options,
    parse,
    positional,
    quiet,
)
from talik.cli.show import console


def command(argv: list[str]) -> None:
    wanted = options(
        "Export",
        ("run", positional(str, "folder of the run", "RUN")),
        ("out", positional(str, "a new folder", "OUT")),
        ("adapter", arg(bool, "adapters by themselves, as a folder of PEFT, in place of merged"), False),
    )
    parsed = parse("export", wanted, argv, "Writes the result of a run as a plain Transformers folder.")
    from talik.cli.show.watch import Watch
    from talik.exporting.whole import export

    quiet()
    with Watch() as watch:
        exported = export(parsed.run, parsed.out, adapter=parsed.adapter, notify=watch)
    what = "a folder of PEFT" if parsed.adapter else "a plain Transformers folder"
    console.result(f"{exported.folder}: {format_bytes(exported.size)}, {what}")
