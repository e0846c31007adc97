"""The command line. A command is imported only when it is called, so that help is fast."""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence

from talik import __version__
from talik.base.errors import NoRoomError, TalikError, UsageError
from talik.base.system import configure_allocators

COMMANDS = {  # arguments and purpose; the code of each is in the file of that name
    "inspect": ("MODEL", "the model's config and sizes in words; no weights are read"),
    "check": (
        "DATA --model M",
        "problems of the data with file and line; lengths, duplicates, languages",
    ),
    "convert": ("DATA OUT.jsonl", "any data format as rows of messages"),
    "preview": ("DATA --model M", "which tokens are trained and which are masked"),
    "plan": (
        "MODEL [DATA]",
        "memory, time and disk of a run, and why it does not fit; no weights are read",
    ),
    "explain": ("MODEL|RUN", "why a common training loop fills the memory, or why a run did not fit"),
    "train": ("MODEL DATA -o RUN", "train; every option: talik train --help"),
    "resume": ("RUN", "continue a run that was stopped"),
    "eval": ("RUN|MODEL DATA", "loss, perplexity and accuracy; the base and the tuned model of a run"),
    "chat": ("RUN|MODEL", "talk to it"),
    "export": ("RUN OUT", "the result as a plain Transformers folder"),
    "machine": ("", "memory and speed of this computer; --machine: of another one, described"),
    "cache": ("list|clear", "list or delete cached hidden states of the frozen layers"),
    "demo": ("", "all of this on a small model and real questions, in minutes"),
}
_LINES = "\n".join(f"  {f'{name} {given}':<24}  {purpose}" for name, (given, purpose) in COMMANDS.items())
HELP = f"""usage: talik COMMAND ...

Fine-tunes the top layers of a language model on the machine you have.

{_LINES}

MODEL is a folder, a Hugging Face id, modelscope:ORG/NAME or a .gguf file.
Exit codes: 0 done, 1 failed, 2 asked for something that cannot be done, 3 does not fit.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # consoles and pipes without Unicode get escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"talik {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"talik: there is no command {argv[0]!r}\n\n{HELP}", end="", file=sys.stderr)
        return 2
    return _guarded(argv[0], argv[1:])


def _guarded(command: str, argv: list[str]) -> int:
    """Runs a command; expected errors become a message and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    configure_allocators()
    module = importlib.import_module(f"talik.cli.{command}")
    try:
        module.command(argv)
    except SystemExit as stop:  # tyro has printed the help, or what is wrong
        return int(stop.code or 0)
    except TalikError as error:
        return _fail(error)
    except KeyboardInterrupt:
        goes_on = command in ("train", "resume", "demo")
        remedy = "A run that has begun goes on with: talik resume RUN" if goes_on else None
        return _fail(TalikError("stopped by Ctrl-C", remedy=remedy))
    except Exception as error:
        known = _of_the_disk(error)
        if known is None:
            raise
        return _fail(known)
    return 0


def _of_the_disk(error: Exception) -> TalikError | None:
    """The error of a full disk or an unusable path in words; None for every other error."""
    number, where = getattr(error, "errno", None), getattr(error, "filename", None)
    if number in (errno.ENOSPC, getattr(errno, "EDQUOT", None)) or re.search(
        r"os error (28|112)\)", str(error)
    ):  # safetensors' own class
        remedy = "Make room; a run goes on with: talik resume RUN"
        return NoRoomError("the disk is full; nothing was left half-written", where=where, remedy=remedy)
    places = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT)
    if number in places and where is not None:
        return UsageError(f"cannot be used: {os.strerror(number)}", where=where, remedy="Name another place.")
    return None


def _fail(error: TalikError) -> int:
    from talik.cli.show import console

    console.failure(error)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
