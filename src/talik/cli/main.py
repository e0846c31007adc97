"""The command line. A command's parser is built only once the command is known, so that help is quick."""

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

HELP = """usage: talik COMMAND ...

Fine-tunes the top layers of a language model on the machine you have.

  inspect MODEL             the model's config and sizes in words; no weights are read
  check DATA --model M      every problem of a data set with file and line; lengths, duplicates, languages
  convert DATA OUT.jsonl    any data format as rows of messages
  preview DATA --model M    which tokens are trained and which are masked
  plan MODEL [DATA]         what training would take, before a weight is loaded: fits or not, and why
  explain MODEL|RUN         why a common habit fills the memory, or why a run did not fit
  train MODEL DATA -o RUN   train; every option: talik train --help
  resume RUN                go on with a run that was stopped
  eval RUN|MODEL DATA       loss, perplexity and accuracy; base beside tuned
  chat RUN|MODEL            talk to it
  export RUN OUT            the result as a plain Transformers folder
  machine                   what this computer has and how fast it is; --machine: another one, described
  cache list|clear          what the trunk handed on, kept for later runs: sizes; remove by KEY or --all
  demo                      all of this on a small model and real questions, in minutes

MODEL is a folder, a Hugging Face id, modelscope:ORG/NAME or a .gguf file.
Exit codes: 0 done, 1 failed, 2 asked for something that cannot be done, 3 does not fit.
"""

COMMANDS = {  # and the module that has its function
    **dict.fromkeys(("inspect", "train", "resume", "eval", "chat", "export"), "commands"),
    **dict.fromkeys(("preview", "check", "convert"), "data_commands"),
    "machine": "plan_commands",
    "plan": "plan_commands",
    "explain": "plan_commands",
    **dict.fromkeys(("cache", "demo"), "commands"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console or pipe without Unicode gets escapes
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
    """Turns what a command raises on purpose into a message and an exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    configure_allocators()
    module = importlib.import_module(f"talik.cli.{COMMANDS[command]}")
    try:
        getattr(module, f"{command}_command")(argv)
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
    """The user's side of a disk that is full or a place that is closed; None for every other error."""
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
    from talik.cli import show

    show.failure(error)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
