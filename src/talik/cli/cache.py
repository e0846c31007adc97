"""`talik cache`: lists or deletes cached hidden states of the frozen layers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from talik.base.errors import UsageError
from talik.cli.options import (
    arg,
    options,
    parse,
    positional,
)


def command(argv: list[str]) -> None:
    wanted = options(
        "Cache",
        ("action", positional(Literal["list", "clear"], "list caches, or delete them", "list|clear")),
        (
            "keys",
            positional(list[str], "delete only these; the beginning of a key is enough", "[KEY ...]"),
            [],
        ),
        ("all", arg(bool, "with clear: every cache"), False),
        ("cache", arg(str | None, "folder of the caches; default: Talik's own"), None),
        ("json", arg(bool, "print it as JSON"), False),
    )
    parsed = parse("cache", wanted, argv, "Lists or deletes cached hidden states of the frozen layers.")
    from talik.cli.show import tables
    from talik.training.trunk.cache_folder import cache_folders, chosen, default_root, remove

    root = Path(parsed.cache) if parsed.cache else default_root()
    if parsed.action == "clear" and bool(parsed.keys) == parsed.all:
        remedy = "`talik cache list` shows the keys."
        raise UsageError("name the caches to remove, or --all for every one", where=root, remedy=remedy)
    folders = chosen(root, parsed.keys) if parsed.keys else cache_folders(root)
    if parsed.action == "clear":
        tables.cleared(root, [(folder, remove(folder)) for folder in folders], parsed.json)
    else:
        tables.caches(root, folders, parsed.json)
