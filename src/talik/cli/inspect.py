"""`talik inspect`: a model's config and sizes in words."""

from __future__ import annotations

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
        "Inspect",
        ("model", positional(str, "a folder, a config.json, a hub id or a .gguf file", "MODEL")),
        ("top_layers", arg(int | None, "say what training the last N layers would train"), None),
        ("json", arg(bool, "print it as JSON"), False),
    )
    parsed = parse("inspect", wanted, argv, "A model's config in words and its sizes; no weights are read.")
    from talik.model.inspection import inspect_model, inspection_text

    quiet()
    inspection = inspect_model(parsed.model, top_layers=parsed.top_layers)
    if parsed.json:
        console.result_json(inspection.as_dict())
    else:
        console.result(inspection_text(inspection))
