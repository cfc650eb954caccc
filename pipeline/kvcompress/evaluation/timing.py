"""Clock and memory counters: time of a call and its spread, memory bandwidth, memory of one contender."""

import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

Result = TypeVar("Result")


class Spread(NamedTuple):
    """Median, and the 10th and 90th percentile, of repeated measurements."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Collection[float]) -> "Spread":
        return cls(*(float(number) for number in np.percentile(list(values), [50, 10, 90])))


def times_faster(reference: Sequence[float], own: Sequence[float]) -> float:
    """Return the median of the ratios of two runs that took turns, so that a slow phase of the machine affects both."""
    return float(np.median(np.divide(reference, own)))


def devices_of(model: PreTrainedModel) -> list[torch.device]:
    """Return every device that holds weights of the model."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def synchronize(devices: Collection[torch.device]) -> None:
    """Wait until GPUs have finished."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def timed(act: Callable[[], Result], devices: Collection[torch.device]) -> tuple[Result, float]:
    """Return the result of a call and the milliseconds it takes, with the work it starts on devices."""
    synchronize(devices)
    start = time.perf_counter()
    result = act()
    synchronize(devices)
    return result, 1000 * (time.perf_counter() - start)


def copy_bandwidth(device: torch.device, rounds: int = 5) -> float:
    """Return bytes a second, read and written, of copying a tensor larger than processor caches; the best of `rounds`."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = [timed(lambda: target.copy_(source), [device])[1] for _ in range(rounds + 1)]
    return 2 * size / (min(times[1:]) / 1000)


def process_peak_bytes() -> int:
    """Return the most bytes of RAM that this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class OwnMemory:
    """Peak GPU memory of one contender, although others hold memory at the same time.

    All the contender's work runs inside `watched`. Memory that it still holds at the end of a turn counts in the next.
    """

    def __init__(self, devices: Collection[torch.device]) -> None:
        self.devices = [device for device in devices if device.type == "cuda"]
        self.own, self.most = [0] * len(self.devices), [0] * len(self.devices)

    @contextmanager
    def watched(self) -> Iterator[None]:
        before = [torch.cuda.memory_allocated(device) for device in self.devices]
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        yield
        for i, device in enumerate(self.devices):
            self.most[i] = max(self.most[i], self.own[i] + torch.cuda.max_memory_allocated(device) - before[i])
            self.own[i] += torch.cuda.memory_allocated(device) - before[i]

    @property
    def peak(self) -> int | None:
        """Bytes, summed over GPUs; None without a GPU."""
        return sum(self.most) if self.devices else None
