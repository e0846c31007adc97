"""`talik demo`: everything on a small model and real questions."""

from __future__ import annotations

from pathlib import Path

from talik.cli.options import arg, options, parse, quiet


def command(argv: list[str]) -> None:
    wanted = options(
        "Demo",
        ("output", arg(str, "folder for the data, the run and the model", "-o"), "talik-demo"),
    )
    parsed = parse("demo", wanted, argv, "Fine-tunes SmolLM2-135M-Instruct on real questions and answers.")
    from talik.cli.demo_steps import demo

    quiet()
    demo(Path(parsed.output))
