"""`talik resume`: continues a run from its newest checkpoint."""

from __future__ import annotations

from talik.cli.options import (
    ENFORCE,
    arg,
    options,
    parse,
    positional,
    quiet,
)
from talik.cli.train import show_result


def command(argv: list[str]) -> None:
    wanted = options(
        "Resume",
        ("run", positional(str, "folder of the run", "RUN")),
        ("enforce", arg(bool, ENFORCE), False),
        ("json", arg(bool, "print the result as JSON"), False),
    )
    parsed = parse("resume", wanted, argv, "Goes on with a run from its newest checkpoint, bit for bit.")
    from talik.cli.show.watch import Watch
    from talik.run import resume

    quiet()
    with Watch() as watch:
        result = resume(parsed.run, enforce=parsed.enforce, notify=watch)
    show_result(result, parsed.json)
