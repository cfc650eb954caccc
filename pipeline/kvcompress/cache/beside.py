"""Work of one layer that a GPU does while the layers after it compute: how a prompt's keys are chosen.

A choice is a hundred small kernels that would each leave the device almost idle; on a stream of their own they run
beside the next layer's products. Results are those of doing it at once, which is what happens on every other device.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Beside:
    """At most one layer's work at a time; what it reads is kept alive until those who come later have waited for it."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._at_work: torch.cuda.Stream | None = None
        self._read: tuple[Tensor, ...] = ()

    @contextmanager
    def work(self, *read: Tensor) -> Iterator[None]:
        """Here kernels are launched beside what follows; `read` are the tensors of the pass that they look at."""
        self.join()
        device = read[0].device
        if device.type != "cuda":
            yield
            return
        stream = self._streams.get(device)
        if stream is None:
            # Of high priority: its kernels are small, and those of the layer beside them fill the device.
            stream = self._streams[device] = torch.cuda.Stream(device, priority=-1)
        stream.wait_stream(torch.cuda.current_stream(device))
        self._at_work, self._read = stream, read
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let what is launched from now on wait for the work; nothing on the host waits."""
        if self._at_work is not None:
            torch.cuda.current_stream(self._at_work.device).wait_stream(self._at_work)
        self._at_work, self._read = None, ()

    def __del__(self) -> None:
        self.join()  # a pass that broke off: the memory that the work writes is about to be given away
