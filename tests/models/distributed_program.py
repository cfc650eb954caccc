"""Program that torchrun starts for tests/models/test_distributed.py: several stages within one group of processes.

Run: torchrun --nproc-per-node N -m tests.models.distributed_program JSON, a list of [stage, flags]. Starting processes
takes seconds, so they stay joined between the stages; all else is as in a run of its own.
"""

import json
import runpy
import sys

import torch

import stages  # noqa: F401 (puts this copy's pipeline first)
from kvcompress.collect.collect import collect_attention
from kvcompress.models import distributed
from tests.tiny import tiny_model

LENGTHS = (300, 40, 120, 41, 42)


def of_different_length(path: str) -> None:
    """Attention sums of texts of very different lengths."""
    texts = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    sums = collect_attention(tiny_model("llama"), texts, 64)
    if distributed.rank() == 0:
        sums.save(path, {})


def main() -> None:
    distributed.join()
    distributed.leave = lambda: distributed.rank() == 0
    for stage, flags in json.loads(sys.argv[1]):
        sys.argv = [stage, *flags]
        try:
            runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            if ended.code:
                raise
    of_different_length("different.safetensors")


if __name__ == "__main__":
    main()
