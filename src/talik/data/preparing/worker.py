"""The worker process: reads chunks from standard input and writes their outcomes to standard output.

It exits when its input ends: the parent process has no more chunks, or has exited.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from typing import Any


def main() -> None:
    """Reads the loader of the tokenizer and the options, then prepares each chunk and writes its outcome."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the parent, and that ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Transformers can load tokenizers without torch, with a warning. Without torch the process needs 200 MB
    # less.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    inward, outward = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a line printed by a library must not get between the outcomes
    try:
        from talik.base.system import release_free_memory
        from talik.data.preparing.prepare import Preparer

        load, options = pickle.load(inward)
        preparer = Preparer(load(), options)
        release_free_memory()  # loading a tokenizer leaves more free memory behind than it needs
        while True:
            _send(outward, preparer.prepare(pickle.load(inward)))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        _send(outward, _picklable(error))


def _send(outward: Any, value: Any) -> None:
    pickle.dump(value, outward, protocol=pickle.HIGHEST_PROTOCOL)
    outward.flush()


def _picklable(error: Exception) -> Exception:
    """Returns the error, or one with its traceback as text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
