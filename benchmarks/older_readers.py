"""Compares what Transformers 4 and 5 make of exports: logits, for six kinds of rotary embeddings.

    python3 dev.py bench older_readers

Installs Transformers 4 into a temporary folder and runs tests/test_older_readers.py with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ["transformers==4.57.1", "huggingface_hub==0.35.3", "tokenizers==0.22.1"]
ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            *PACKAGES,
        ]
        if code := subprocess.call(install):
            return code
        test = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-rP", "tests/test_older_readers.py"]
        environment = {**os.environ, "TALIK_TRANSFORMERS_4": folder}
        done = subprocess.run(test, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    print("\n".join(line for line in lines if line.startswith("{") or done.returncode))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
