"""Shares the documents of a stage among several processes: documents of this process, sums over all, results in order.

An overlay on torch.distributed for processes that torchrun starts; in one process every function does nothing. Each
process loads the model, works on its own documents and ends up with the whole result; `rank` 0 alone writes it and
shows a progress bar. Processes exchange a few float64 tensors a stage: over NCCL if every process has a GPU, else over
gloo.

Processes that hold shards of one model (`kvcompress.models.tensor_parallel`) do not share documents: each works on all.

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

START_TIMEOUT = timedelta(seconds=120)  # until all processes have found each other
TIMEOUT = timedelta(days=7)  # for the slowest process's documents; torchrun notices a dead process at once
DIMENSIONS = 8  # most dimensions of a tensor that is exchanged


@dataclass
class Joined:
    """Process group of this process, and the device on which tensors are exchanged."""

    rank: int
    size: int
    group: Any
    device: torch.device
    one_model: bool = False  # all processes together hold one model, split by tensor parallelism


_joined: Joined | None = None


def started() -> bool:
    """Return True if torchrun's variables say that this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    return _joined.rank if _joined else 0


def size() -> int:
    return _joined.size if _joined else 1


def one_model() -> bool:
    """Return True if the processes hold shards of one model, so that all of them work on the same documents."""
    return _joined is not None and _joined.one_model


def hold_one_model() -> None:
    """Make `one_model` true from now on. Every process has to call this."""
    assert _joined is not None
    _joined.one_model = True


def join() -> None:
    """Join the other processes, unless that was done before or there are none.

    Raises `KVCompressError` if a process does not join in time.
    """
    global _joined
    if not started() or _joined:
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    parent = os.getppid()
    try:
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=START_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise KVCompressError(f"the processes of this run did not find each other: {str(error)[:200]}") from error
    group = dist.new_group(timeout=TIMEOUT, backend=backend)
    _joined = Joined(dist.get_rank(), dist.get_world_size(), group, torch.device("cpu"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: int) -> None:
    """End this process when its torchrun is killed, so that it cannot write into a later run."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def leave() -> bool:
    """Leave the group once the result is complete. Return True in the one process that writes it.

    A process that failed does not call this; it just ends.
    """
    global _joined
    first = rank() == 0
    if _joined:
        _joined = None
        dist.destroy_process_group()
    return first


def own_device(name: str) -> str:
    """Return this process's device for `model.device`: the processes of a machine take its GPUs in turn.

    Several may share a GPU, because a small model is bound by Python and leaves it idle. Raises `InputError` if a
    single device is named for several processes.
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
    """Exchange tensors on `device` from now on, if every process has a GPU of its own. Every process has to call this.

    Otherwise they are exchanged on the CPU: NCCL needs one GPU for each process.
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
    """Return the indices of the items that this process works on, ascending; every item belongs to one process.

    Items are dealt from the costliest down, each to the process with the least total so far. If the processes hold one
    model, every process works on all items.
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
    """Sum each tensor (float64, equal shapes in all processes) over all processes; every process gets the sums.

    Processes that hold one model have each done all the work, and nothing is added.
    """
    if _joined is None or _joined.one_model:
        return dict(tensors)
    flat = add_up(torch.cat([tensor.reshape(-1) for tensor in tensors.values()]))
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def in_order(found: Mapping[int, Tensor], count: int) -> list[Tensor]:
    """Return the tensors of items 0 ... `count` - 1 of all processes, float64 on the CPU; their shapes may differ.

    `found` holds the items of this process. Nothing is pickled: shapes go first, then one buffer that is zero except
    for a process's own items. Adding zeros changes no bit.
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
    """Sum a contiguous float64 tensor over all processes; returned on the CPU."""
    assert _joined is not None
    moved = own.to(_joined.device, torch.float64)
    try:
        dist.all_reduce(moved, group=_joined.group)
        return moved.cpu()
    except RuntimeError as error:
        raise KVCompressError(
            f"process {_joined.rank} of {_joined.size} lost contact with another, whose own message gives the cause"
        ) from error


def progress(total: int, desc: str, unit: str, shown: bool = True) -> "tqdm[Any]":
    """Return a progress bar over this process's own work, shown by process 0 alone."""
    label = desc if size() == 1 or one_model() else f"{desc}, 1 of {size()} processes"
    return tqdm(total=total, desc=label, unit=unit, disable=not shown or rank() > 0)
