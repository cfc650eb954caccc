"""Section `machine`: how this machine runs the pipeline. No stage depends on it, because no result does."""

from typing import Literal

import torch

from kvcompress.core.params import Count, SectionParams


class MachineParams(SectionParams):
    """`processes` share the documents of a stage that runs a model: a number, or `gpus` for one on each GPU.

    The section may be left out: one process.
    """

    section = "machine"
    optional = True

    processes: Count | Literal["gpus"] = 1

    @property
    def count(self) -> int:
        """Processes on this machine, at least 1."""
        return max(1, torch.cuda.device_count()) if self.processes == "gpus" else self.processes
