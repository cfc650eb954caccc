"""Work of one layer that a GPU does while the layers after it compute: how a prompt's keys are chosen.

A choice is a hundred small kernels that would each leave the device almost idle; on a stream of their own they run
beside the next layer's products. Results are those of doing it at once, which is what happens on every other device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device for this: memory that was freed on it can serve the next choice, of any cache."""
    return torch.cuda.Stream(device, priority=-1)  # high: its kernels are small, and the layer beside fills the device


class Beside:
    """At most one layer's work at a time; what it reads is kept alive until those who come later have waited for it."""

    def __init__(self) -> None:
        self._device: torch.device | None = None  # that is at work
        self._read: tuple[Tensor, ...] = ()

    @contextmanager
    def work(self, *read: Tensor) -> Iterator[None]:
        """Here kernels are launched beside what follows; `read` are the tensors of the pass that they look at."""
        self.join()
        device = read[0].device
        if device.type != "cuda":
            yield
            return
        stream = stream_of(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        self._device, self._read = device, read
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let what is launched from now on wait for the work; nothing on the host waits."""
        if self._device is not None:
            torch.cuda.current_stream(self._device).wait_stream(stream_of(self._device))
        self._device, self._read = None, ()

    def __del__(self) -> None:
        self.join()  # a pass that broke off: the memory that the work writes is about to be given away
