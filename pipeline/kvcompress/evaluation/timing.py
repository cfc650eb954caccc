"""What a clock and a device's own counters say: time of a call, its spread, speed of memory, memory of one contender.

A call's time includes the work it left to a GPU. Nothing here knows what is timed.
"""

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
    """Median of the ratios of two runs that took turns: what slows a machine for a while slows both of a pair."""
    return float(np.median(np.divide(reference, own)))


def devices_of(model: PreTrainedModel) -> list[torch.device]:
    """Every device that holds weights of the model."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def synchronize(devices: Collection[torch.device]) -> None:
    """Wait until GPUs have done what they were given."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def timed(act: Callable[[], Result], devices: Collection[torch.device]) -> tuple[Result, float]:
    """What a call returns, and the milliseconds it takes, the devices' work included."""
    synchronize(devices)
    start = time.perf_counter()
    result = act()
    synchronize(devices)
    return result, 1000 * (time.perf_counter() - start)


def copy_bandwidth(device: torch.device, rounds: int = 5) -> float:
    """Bytes a second, read and written, of copying a tensor too large for any processor cache; the best of `rounds`."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = [timed(lambda: target.copy_(source), [device])[1] for _ in range(rounds + 1)]
    return 2 * size / (min(times[1:]) / 1000)


def process_peak_bytes() -> int:
    """The most memory this process ever had in RAM, everything it did together."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class OwnMemory:
    """The most that one contender alone had allocated on GPUs, though others hold theirs beside it.

    Everything the contender does stands inside `watched`; what it still holds at the end of one turn counts in the next.
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
        """Bytes, summed over GPUs; None where there is none."""
        return sum(self.most) if self.devices else None
