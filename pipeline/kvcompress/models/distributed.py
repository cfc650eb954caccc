"""Several processes share a stage's documents: which are mine, sums over all, results back in the documents' order.

An overlay on torch.distributed for what torchrun starts; in one process every function here is the obvious nothing. Each
process loads the model, works on its own documents, and ends up with the whole result; `rank` 0 alone writes it and shows
a progress bar. Exchanged are float64 tensors, a few a stage: over NCCL where every process has a GPU, over gloo elsewhere.

Where the processes hold parts of one model (`kvcompress.models.tensor_parallel`) there is nothing to share: each works on all documents.

A process that ends early ends the run: torchrun stops the others, and none writes before all have delivered.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from kvcompress.core.errors import InputError, KVCompressError

MEETING = timedelta(seconds=120)  # until all processes have found each other
WAITING = timedelta(days=7)  # for the slowest process's documents; one that died is noticed by torchrun, at once
DIMENSIONS = 8  # of a tensor that is exchanged, at most


@dataclass
class Joined:
    """The group that this process belongs to, on which device its tensors are exchanged, and what it holds."""

    rank: int
    size: int
    group: Any
    device: torch.device
    one_model: bool = False  # all processes together hold one model, split by tensor parallelism


_joined: Joined | None = None


def started() -> bool:
    """Whether torchrun (or whoever sets its variables) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    return _joined.rank if _joined else 0


def size() -> int:
    return _joined.size if _joined else 1


def one_model() -> bool:
    """Whether the processes hold parts of one model, so that all of them work on the same documents."""
    return _joined is not None and _joined.one_model


def hold_one_model() -> None:
    """From now on `one_model`; every process has to call this."""
    assert _joined is not None
    _joined.one_model = True


def join() -> None:
    """Meet the other processes, where nobody else did so yet; nothing where there are none.

    Raises `KVCompressError` where one does not come.
    """
    global _joined
    if not started() or _joined:
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    parent = os.getppid()
    try:
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=MEETING)
    except (RuntimeError, ValueError) as error:
        raise KVCompressError(f"the processes of this run did not find each other: {str(error)[:200]}") from error
    group = dist.new_group(timeout=WAITING, backend=backend)
    _joined = Joined(dist.get_rank(), dist.get_world_size(), group, torch.device("cpu"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: int) -> None:
    """End this process when its torchrun was killed, lest it write into the run that comes after."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def leave() -> bool:
    """Part from the others once the result is whole; true in the one process that is to write it.

    A process that failed does not part, it just ends.
    """
    global _joined
    first = rank() == 0
    if _joined:
        _joined = None
        dist.destroy_process_group()
    return first


def own_device(name: str) -> str:
    """The device `name` of `model.device` for this process: the processes of a machine take its GPUs in turn.

    A GPU may serve several, which a small model, bound by Python, leaves idle otherwise. Raises `InputError` where all
    would share the one that is named.
    """
    if size() == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name not in ("auto", "cuda"):
        if together > 1:
            raise InputError(f"model.device is {name!r}, but {together} processes need a GPU each: expected auto")
        return name
    return f"cuda:{local % there}"


def exchange_on(device: torch.device) -> None:
    """Exchange tensors on `device` from now on, if every process of the run has a GPU for itself; all have to call this.

    Else they stay on the CPU: several processes on one GPU, or some without any, cannot take NCCL.
    """
    if _joined is None:
        return
    alone = device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    every = torch.tensor(int(alone))
    dist.all_reduce(every, dist.ReduceOp.MIN, group=_joined.group)
    if every:
        _joined.device = device


def mine(costs: Sequence[float]) -> list[int]:
    """Which of the items with these costs this process works on, ascending; every item belongs to one process.

    The dearest goes first, each to the process with the least so far, so that items of very different cost balance too.
    Where the processes hold one model, every item is every process's.
    """
    if one_model():
        return list(range(len(costs)))
    loads, own = [0.0] * size(), []
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        least = loads.index(min(loads))
        loads[least] += costs[item]
        if least == rank():
            own.append(item)
    return sorted(own)


def summed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor (float64, the same shapes everywhere) summed over all processes, which all get the sums.

    Where they hold one model each has done all the work, and there is nothing to add.
    """
    if _joined is None or _joined.one_model:
        return dict(tensors)
    flat = add_up(torch.cat([tensor.reshape(-1) for tensor in tensors.values()]))
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def in_order(found: Mapping[int, Tensor], count: int) -> list[Tensor]:
    """The tensors of items 0 ... `count` - 1, whoever made them, as float64 on the CPU; they may differ in shape.

    `found` holds this process's own. Nothing is pickled: shapes go first, then one buffer that is zero wherever it is not
    one's own; adding zeros changes no bit.
    """
    if _joined is None or _joined.one_model:
        return [found[item].double().cpu() for item in range(count)]
    shapes = torch.zeros(count, DIMENSIONS + 1, dtype=torch.float64)
    for item, tensor in found.items():
        shapes[item, : tensor.dim() + 1] = torch.tensor([tensor.dim(), *tensor.shape], dtype=torch.float64)
    rows = [[int(number) for number in row] for row in add_up(shapes).tolist()]
    sizes = [torch.Size(row[1 : row[0] + 1]) for row in rows]
    flat = torch.zeros(sum(one.numel() for one in sizes), dtype=torch.float64)
    for item, part in enumerate(flat.split([one.numel() for one in sizes])):
        if item in found:
            part.copy_(found[item].reshape(-1))
    parts = add_up(flat).split([one.numel() for one in sizes])
    return [part.view(one) for part, one in zip(parts, sizes, strict=True)]


def add_up(own: Tensor) -> Tensor:
    """Sum of a contiguous float64 tensor over all processes, on the CPU."""
    assert _joined is not None
    moved = own.to(_joined.device, torch.float64)
    try:
        dist.all_reduce(moved, group=_joined.group)
        return moved.cpu()
    except RuntimeError as error:
        raise KVCompressError(
            f"process {_joined.rank} of {_joined.size} lost another one, whose own message says why"
        ) from error


def progress(total: int, desc: str, unit: str, shown: bool = True) -> "tqdm[Any]":
    """A progress bar over this process's own work; only process 0 shows it, and says of how many it is."""
    label = desc if size() == 1 or one_model() else f"{desc}, 1 of {size()} processes"
    return tqdm(total=total, desc=label, unit=unit, disable=not shown or rank() > 0)
