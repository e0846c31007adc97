"""A process that prepares chunks for another one: chunks arrive on standard input, outcomes leave on standard
output.

It ends with its input, when the other process has finished or died.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from typing import Any


def main() -> None:
    """Reads how to load the tokenizer and how to prepare, then answers each chunk with its outcome."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the other process, which ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Transformers loads tokenizers without torch if there is none, with a warning; torch takes 200 MB.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    inward, outward = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the outcomes
    try:
        from talik.base.system import release_free_memory
        from talik.data.preparing.prepare import Preparer

        load, options = pickle.load(inward)
        preparer = Preparer(load(), options)
        release_free_memory()  # loading a tokenizer leaves more free memory than the tokenizer takes
        while True:
            _answer(outward, preparer.prepare(pickle.load(inward)))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        _answer(outward, _portable(error))


def _answer(outward: Any, value: Any) -> None:
    pickle.dump(value, outward, protocol=pickle.HIGHEST_PROTOCOL)
    outward.flush()


def _portable(error: Exception) -> Exception:
    """The error, or one with its text if it cannot be given to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
