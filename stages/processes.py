"""How a stage comes to share its documents with other processes: by torchrun, or by `machine.processes` in params.yaml.

    torchrun --nproc-per-node 2 -m stages.collect_attention
    dvc repro                                  # with machine.processes: 2

The second starts the same command under torchrun's own launcher, on this machine; both give what one process gives.
"""

import os
import sys
from pathlib import Path

from kvcompress.core.errors import KVCompressError
from kvcompress.core.params import load_section
from kvcompress.models import distributed
from kvcompress.models.params import MachineParams


def share_documents(params: Path) -> None:
    """Join the processes that this one was started with, or start them; a stage that works alone goes on.

    Raises `SystemExit` where others did the work, and `KVCompressError` where these failed.
    """
    if "WORLD_SIZE" not in os.environ:
        processes = load_section(MachineParams, params).count
        if processes > 1:
            launch(processes)
            raise SystemExit(0)
    distributed.join()


def launch(processes: int) -> None:
    """Run this very command in `processes` processes. Raises `KVCompressError` where one of them failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    spec = sys.modules["__main__"].__spec__
    if spec is None or not spec.name.startswith("stages."):
        raise KVCompressError("machine.processes needs a stage that is started as python -m stages.NAME")
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else every process would want all cores
    flags = ["--standalone", "--nproc-per-node", str(processes), "-m", spec.name, *sys.argv[1:]]
    try:
        run(parse_args(flags))
    except ChildFailedError as error:
        local, failure = error.get_first_failure()
        raise KVCompressError(
            f"process {local} of {processes} ended with code {failure.exitcode}, so {spec.name} left no result"
        ) from error
