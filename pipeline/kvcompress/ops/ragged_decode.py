"""Attention of one token over a layer's KV heads of unequal length, in one launch on a GPU.

`decode` works on tensors and knows no model and no cache. It reads the count of tokens seen from the device and never
waits for the device, so it can be captured in a CUDA graph. The kernel, `ragged_decode_kernel`, is imported with the
first use, because it needs triton (which comes with torch for CUDA).
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from math import e, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNBOUNDED = 2**31 - 1  # capacity of a head that grows with the text, as in the kernel
UNIT = 16  # keys a unit of work; finer than a block, so that all programs end at the same time
LARGEST_SIZE = 256  # head size
MOST_SUMS = 8192  # query heads a KV head times value head size: sums that still fit a program's registers
SHARED_MEMORY = 100 * 1024  # bytes that one program may fill with keys and values
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Tuning:
    """Launch parameters of the decode kernel. None of them changes a result beyond rounding.

    Parameters
    ----------
    block: keys a block.
    programs_per_processor: programs a multiprocessor. A CPU (triton's interpreter) counts as one multiprocessor.
    warps: warps a program.
    stages: stages of the pipeline that loads keys and values.
    whole: largest head, in keys, that one program always reads alone.
    extra: units of 16 keys added to such a head for the cost of its start and end.
    ahead: keys that a program prefetches while the previous launch is ending.
    lead: keys left to read, a block at least, when a program allows the next launch. `ahead` and `lead` matter only on
        devices that overlap launches.
    """

    block: int = 32
    programs_per_processor: int = 2
    warps: int = 2
    stages: int = 3
    whole: int = 256
    extra: int = 24
    ahead: int = 128
    lead: int = 128

    @classmethod
    def fitting(cls, bytes_a_key: int, group: int) -> "Tuning":
        """Return the parameters that were fastest on an H100: defaults for grouped queries, more programs without.

        Blocks are small enough for two programs to fit a multiprocessor's shared memory.
        """
        block = cls.block
        while block > 16 and block * bytes_a_key * (cls.stages - 1) > SHARED_MEMORY:
            block //= 2
        return cls(block) if group > 1 else cls(block, programs_per_processor=4, extra=10)


class GroupSlots(NamedTuple):
    """Slots of some KV heads of a layer, in one pair of contiguous tensors `[batch, len(heads), slot, head_dim]`.

    The first `min(capacity, seen)` slots are in use (capacity None: all seen). The first `sinks` slots never move, the
    others are a ring, which decides where a new column is stored and what a padded row sees. Head sizes of K and V may
    differ.
    """

    heads: Sequence[int]
    keys: Tensor
    values: Tensor
    capacity: int | None
    sinks: int = 0


def table_of(groups: Sequence[GroupSlots], heads: int) -> Tensor:
    """Build the kernel's int64 table `[heads, 6]` on the groups' device; heads in no group hold nothing.

    The table contains addresses: build a new one after a tensor has moved.
    """
    lines = [[0] * 6 for _ in range(heads)]
    for heads_of, keys, values, capacity, sinks in groups:
        for at, head in enumerate(heads_of):
            lines[head] = [keys[0, at].data_ptr(), values[0, at].data_ptr(), keys.stride(0), values.stride(0)]
            lines[head] += [UNBOUNDED if capacity is None else capacity, sinks]
    return torch.tensor(lines).to(groups[0].keys.device, non_blocking=True)


@dataclass
class Scratch:
    """Memory for partial results, reused by launches on one stream; `arrivals` is all 0 between launches."""

    partial: Tensor
    stats: Tensor
    arrivals: Tensor

    @classmethod
    def of(cls, sums: int, tops: int, pairs: int, device: torch.device) -> "Scratch":
        with torch.inference_mode(False):
            partial, stats = (torch.empty(size, dtype=torch.float32, device=device) for size in (sums, tops))
            return cls(partial, stats, torch.zeros(pairs, dtype=torch.int32, device=device))

    def fits(self, sums: int, tops: int, pairs: int) -> bool:
        return sums <= self.partial.numel() and tops <= self.stats.numel() and pairs <= self.arrivals.numel()


@cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a device; 1 for a CPU, 0 for a GPU too old for the kernel."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major >= 8 else 0


@cache
def overlaps(device: torch.device) -> bool:
    """True if a device can start a launch while the previous one is ending."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 9


@cache
def kernel() -> Any:
    """Module of the kernel; None without triton, or (after a warning) where triton cannot build anything."""
    try:
        from kvcompress.ops import ragged_decode_kernel
    except ImportError:
        return None
    if torch.cuda.is_available():
        import triton

        try:
            triton.runtime.driver.active.get_current_device()  # builds triton's own helper: needs a C compiler
        except Exception as error:
            warnings.warn(f"triton cannot build kernels, so heads are decoded group by group: {error}", stacklevel=2)
            return None
    return ragged_decode_kernel


def can_decode(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """True if the kernel serves a query `[batch, kv_head, group, 1, head_dim]` over a cache of such K and V."""
    return (
        query.device.type == "cuda"
        and processors(query.device) > 0
        and query.shape[2] * values.shape[-1] <= MOST_SUMS
        and query.dtype == keys.dtype == values.dtype
        and query.dtype in DTYPES
        and all(
            tensor.shape[-1] <= LARGEST_SIZE and tensor.shape[-1] * tensor.element_size() % 16 == 0
            for tensor in (keys, values)
        )
        and kernel() is not None
    )


def decode(
    query: Tensor,
    table: Tensor,
    value_size: int,
    seen: Tensor,
    pads: Tensor | None = None,
    scale: float | None = None,
    scratch: Scratch | None = None,
    tuning: Tuning | None = None,
    new: tuple[Tensor, Tensor] | None = None,
    settled: bool = False,
) -> tuple[Tensor, Scratch]:
    """Softmax attention of one query a row, `[batch, query_head, head_dim]` -> `[batch, query_head, value_size]`.

    A head that holds nothing gives exactly 0, and so does a row of nothing but padding.

    Parameters
    ----------
    table: from `table_of`, over tensors of the query's dtype, at most 256 columns wide and of a multiple of 16 bytes.
        The table's heads share the query heads equally.
    seen: int32 `[1]`, columns in the cache, the query's own included.
    pads: integers `[batch]`, columns of left padding [default: none].
    scale: multiplies scores [default: head_dim ** -0.5].
    scratch: memory of an earlier call, reused if it is large enough.
    new: keys and values of the last column, `[batch, kv_head, head_dim]` each, which are first stored in their slots
        (by the ring's rule, except in the sinks of a padded row) [default: they are stored already].
    settled: the previous launch on this stream writes none of `table`, `seen` and `pads`. They are then read while that
        launch is still ending, on devices that can.

    Returns the output and the scratch memory for the next call.
    """
    batch, query_heads, size = query.shape
    heads, device = table.shape[0], query.device
    group = query_heads // heads
    key_large, key_small = _halves(size)
    # With fewer columns than rows in a product, triton makes all warps do the same work.
    value_large, value_small = _halves(value_size, least=32)
    if tuning is None:
        tuning = Tuning.fitting((key_large + key_small + value_large + value_small) * query.element_size(), group)
    programs = processors(device) * tuning.programs_per_processor
    needs = 2 * programs * group * value_size, 4 * programs * group, batch * heads
    if scratch is None or not scratch.fits(*needs):
        scratch = Scratch.of(*needs, device)
    query, *fresh = (t if t.stride(2) == 1 else t.contiguous() for t in (query, *(new or (query, query))))
    out = torch.empty(batch, query_heads, value_size, dtype=query.dtype, device=device)
    span, overlapping = power_from(group), overlaps(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel().decode_heads[(programs,)](
            query,
            out,
            table,
            seen,
            seen if pads is None else pads,
            *fresh,
            scratch.partial,
            scratch.stats,
            scratch.arrivals,
            batch,
            query.stride(0),
            query.stride(1),
            *(stride for tensor in fresh for stride in tensor.stride()[:2]),
            (size**-0.5 if scale is None else scale) * log2(e),
            tuning.whole,
            tuning.extra,
            int(settled),
            HEADS=heads,
            GROUP=group,
            SIZE=size,
            VALUE_SIZE=value_size,
            PADDED=pads is not None,
            APPEND=new is not None,
            WIDE=device.type == "cpu",
            OVERLAP=overlapping,
            AHEAD=tuning.ahead,
            LEAD=tuning.lead,
            UNIT=UNIT,
            BLOCK=tuning.block,
            ROWS=max(span, 16),
            SPAN=span,
            HEADS_SPAN=power_from(heads),
            BATCH_SPAN=1 if pads is None else power_from(batch),
            KEY_LARGE=key_large,
            KEY_SMALL=key_small,
            VALUE_LARGE=value_large,
            VALUE_SMALL=value_small,
            AT_A_TIME=max(min(32, 64 // span), 1),
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **({"launch_pdl": True} if overlapping else {}),
        )
    return out, scratch


def power_from(least: int) -> int:
    """Smallest power of two that is at least `least`."""
    return 1 << (least - 1).bit_length()


def _halves(size: int, least: int = 16) -> tuple[int, int]:
    """Cover a head size, as tightly as possible, by two powers of two of at least `least`, or by one and 0."""
    whole = max(power_from(size), least)
    large = whole // 2
    small = max(power_from(size - large), least)
    return (large, small) if large >= least and size < whole and large + small < whole else (whole, 0)
