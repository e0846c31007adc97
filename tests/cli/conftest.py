"""Running commands in this process."""

from __future__ import annotations

import pytest

from helpers.commands import Done, Talik
from talik.cli.main import main


@pytest.fixture
def talik(capsys: pytest.CaptureFixture[str]) -> Talik:
    """Runs `talik ARGUMENTS` in this process."""

    def run(*argv: object) -> Done:
        capsys.readouterr()
        code = main([str(part) for part in argv])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run
