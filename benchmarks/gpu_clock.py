"""Timing on a CUDA device: graphs that leave the host's part out, contenders in turns, and the speed of memory."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

WARM_UP = 3


def capture(acts: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """The replay of a CUDA graph of some acts one after the other; each is done once before, to compile and allocate."""
    for act in acts:
        act()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for act in acts:
            act()
    replay: Callable[[], None] = graph.replay
    return replay


def clock(acts: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median microseconds of each, taken in turns; L2 is filled with something else before each."""
    other = torch.zeros(2**26, device=device)
    top = torch.zeros((), device=device)
    times: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(rounds + WARM_UP):
        for name in list(acts) if turn % 2 else reversed(list(acts)):
            torch.amax(other, dim=0, out=top)  # read, not written: nothing is left to write back
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            acts[name]()
            end.record()
            end.synchronize()
            times[name].append(1000 * start.elapsed_time(end))
    return {name: median(found[WARM_UP:]) for name, found in times.items()}


def copy_bandwidth(rounds: int, device: torch.device) -> float:
    """Bytes a microsecond of a device-to-device copy of 1 GiB, read and written."""
    source = torch.ones(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return 2 * source.nbytes / clock({"copy": copy}, rounds, device)["copy"]
