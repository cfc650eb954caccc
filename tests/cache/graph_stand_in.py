"""A CPU's stand-in for what a decode step has on a GPU: the kernel of the cache, and the capture of a CUDA graph.

The recording of a step notes every operation with the very tensors it read and wrote, and a replay does them again:
numbers that Python made are frozen, as in a CUDA graph, and only what the "device" counts goes on. An operation that
would have to wait for a device is an error.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompress.cache import cuda_graph, fused_decode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")


class Recorder(TorchDispatchMode):
    """Does what it notes."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in WAITS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.done:
            again = func(*args, **kwargs)
            pairs = zip(again, out, strict=True) if isinstance(out, tuple | list) else [(again, out)]
            for fresh, old in pairs:
                if isinstance(fresh, torch.Tensor) and fresh.data_ptr() != old.data_ptr():
                    old.copy_(fresh)


def record(act, device):
    """As `cuda_graph.record`, but the step is done once; so the first replay, which follows at once, does nothing."""
    recorder = Recorder()
    with recorder:
        act()
    waiting = [True]

    def replay():
        if waiting:
            waiting.pop()
        else:
            recorder.replay()

    return replay


def slow_decode(query, table, value_size, seen, pads, scale, scratch, new, settled):
    """As `decode`, from tensors that stay where they are and with nothing read on the host; `table` is the parts."""
    out = query.new_zeros(*query.shape[:2], value_size)
    parts, heads = table
    group = query.shape[1] // heads
    last = seen.long() - 1
    for of, keys, values, capacity, sinks in parts:
        window = 1 if capacity is None else capacity - sinks
        slots = torch.arange(keys.shape[2])
        at = slots if capacity is None else torch.where(slots < sinks, slots, last - (last - slots) % window)
        if new is not None:
            slot = last if capacity is None else torch.where(last < sinks, last, sinks + (last - sinks) % window)
            for held, fresh in zip((keys, values), new, strict=True):
                held.index_copy_(2, slot, fresh[:, list(of), None])
        shown = (slots <= last)[None]
        if pads is not None:
            real = at - pads[:, None]
            of_ring = real >= (0 if capacity is None else sinks)
            shown = shown & torch.where((slots < sinks)[None], slots + pads[:, None] <= last, of_ring)
        rows = query.view(query.shape[0], heads, group, -1)[:, list(of)]
        scores = rows @ keys.transpose(2, 3) * (query.shape[2] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~shown[:, None, None], float("-inf"))
        found = scores.softmax(-1).nan_to_num() @ values.nan_to_num()
        out.view(query.shape[0], heads, group, -1)[:, list(of)] = found
    return out, scratch or object()


def stand_in(monkeypatch):
    """Let the cache and the decoder believe in a GPU."""
    monkeypatch.setattr(fused_decode, "can_decode", lambda *_: True)
    monkeypatch.setattr(fused_decode, "table_of", lambda parts, heads: (parts, heads))
    monkeypatch.setattr(fused_decode, "decode", slow_decode)
    monkeypatch.setattr(cuda_graph, "can_record", lambda _: True)
    monkeypatch.setattr(cuda_graph, "record", record)
