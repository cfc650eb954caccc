"""The pipeline's stage scripts: each parses its flags, calls the library and writes its artifacts.

Run one as `python -m stages.NAME --help`. This copy's `pipeline/` goes first on the import path, so that a queued
experiment in its own folder runs its own code and not that of an installed or another checkout.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pipeline"))
