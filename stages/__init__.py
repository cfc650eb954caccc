"""The pipeline's stage scripts: each parses its flags, calls the library and writes its artifacts.

Run one as `python -m stages.NAME --help`. This copy's `pipeline/` goes first on the import path, so that a queued
experiment in its own folder runs its own code and not that of an installed or another checkout.

Threads of OpenMP wait for each other briefly and then sleep. By default they spin for milliseconds, after every small
operation: on a machine with other work that takes the time of the thread that is waited for, and a stage up to 30 times
as long. The setting is read when torch is first imported.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "pipeline"))
