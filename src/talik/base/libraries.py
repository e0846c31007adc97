"""Optional libraries: checks that they are installed, and shortens their errors to one line."""

from __future__ import annotations

import importlib.util

from talik.base.errors import SourceError


def need_packages(extra: str, *packages: str, where: object) -> None:
    """Raises SourceError if a package of one of Talik's extras is not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        remedy = f'pip install "talik[{extra}]"'
        raise SourceError(f"this needs the package {' and '.join(missing)}", where=where, remedy=remedy)


def one_line(error: BaseException) -> str:
    """The type and the first line of an error, or of its cause."""
    error = error.__cause__ or error
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
