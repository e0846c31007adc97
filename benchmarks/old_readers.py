"""python3 dev.py bench old_readers: exports read by Transformers 4, logits compared with Transformers 5's.

Transformers 4 gets a folder of its own in Talik's home, made once (it needs a package index). The comparison
is tests/test_old_readers.py, which prints a line for each family and form of config.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from talik.base.files import finished_folder
from talik.base.system import home_folder

ROOT = Path(__file__).parents[1]
PACKAGES = ["transformers==4.57.1", "huggingface_hub==0.35.3", "tokenizers==0.22.1"]


def transformers_4() -> Path:
    """The folder with Transformers 4 and what it asks for."""
    folder = home_folder() / "versus" / PACKAGES[0]
    if not folder.exists():
        print(f"making {folder}; this happens once", file=sys.stderr)
        with finished_folder(folder) as part:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", "--target", str(part), *PACKAGES], check=True)
    return folder


if __name__ == "__main__":
    environment = {**os.environ, "TALIK_TRANSFORMERS_4": str(transformers_4())}
    test = ROOT / "tests" / "test_old_readers.py"
    command = [sys.executable, "-m", "pytest", str(test), "-rP", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=environment, check=False, cwd=ROOT).returncode)
