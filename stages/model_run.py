"""The start of a stage that runs a model: which model, at what precision, on what device, in how many processes.

    torchrun --nproc-per-node 2 -m stages.collect_attention
    dvc repro                                  # with machine.processes: 2 in params.yaml

Both divide the documents among two processes and give the result of one. The second starts the same command under
torchrun's own launcher, on this machine.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from kvcompress.core.artifacts import read_model
from kvcompress.core.errors import InputError, KVCompressError
from kvcompress.core.outputs import Paths, require_outputs
from kvcompress.core.params import SectionParams, load_section, override
from kvcompress.models import distributed
from kvcompress.models.params import MachineParams, ModelParams, source_of
from kvcompress.models.sources import ModelRecord, locate_model


def chosen_model(
    data_dir: Path, model_id: str | None, loading: ModelParams, section: SectionParams, tokens: int
) -> ModelRecord:
    """The pipeline's model, or the one that `--model-id` names; `tokens` of a document must fit its context."""
    record = read_model(data_dir / "model.json", ModelRecord) if model_id is None else locate_model(loading)[0]
    if tokens > record.max_context:
        raise InputError(
            f"{section.section}.max_tokens is {tokens}, but the context of {record.id} ends at {record.max_context}"
        )
    return record


def require_apart_from_model(
    params: Path, data_dir: Path, model_id: str | None, files: Iterable[Path | None], **others: Paths
) -> None:
    """Raise `InputError` if an output of a stage that runs a model cannot be written or would touch an input.

    Inputs are the parameters, the corpus, the model, and `others` by their flags, with underscores for dashes.
    """
    inputs: dict[str, Paths] = {"--params": params, "the folder of texts": data_dir / "corpus"}
    if model_id is None:
        record = data_dir / "model.json"
        inputs |= {"the model's record": record, "the model": read_model(record, ModelRecord).path}
    else:
        inputs["--model-id"] = model_id if Path(model_id).is_dir() else None
    inputs |= {f"--{flag.replace('_', '-')}": paths for flag, paths in others.items()}
    require_outputs(inputs, files)


def model_params(params: Path, model_id: str | None, bf16: bool | None, device: str | None) -> ModelParams:
    """The section `model` of `params` with the flags that choose another model, precision or device."""
    dtype = None if bf16 is None else "bfloat16" if bf16 else "float32"
    section = load_section(ModelParams, params, dtype=dtype, device=device)
    return section if model_id is None else override(section, **source_of(model_id, "main", "--model-id"))


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
