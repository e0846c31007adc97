"""`python -m talik.cli` is the command `talik`."""

import sys

from talik.cli.main import main

sys.exit(main())
