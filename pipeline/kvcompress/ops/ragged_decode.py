"""One token's attention over a layer's KV heads of unequal length, in one launch on a GPU.

`decode` is the bare operation on tensors: it knows nothing of a model or a cache, reads the count of tokens seen from
the device, never waits for the device, and so can be captured in a CUDA graph. `fused` is how a cache comes to use it.
The kernel is `decode_kernel`, imported with the first use, because it needs triton (which comes with torch for CUDA).
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

UNBOUNDED = 2**31 - 1  # a capacity, as the kernel has it
UNIT = 16  # keys: what programs divide the work by, finer than a block so that all end at the same time
LARGEST_SIZE = 256  # of a head
MOST_SUMS = 8192  # query heads a KV head times values' head size: sums that still fit a program's registers
SHARED_MEMORY = 100 * 1024  # bytes that one program may fill with keys and values
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Tuning:
    """Keys a block, programs a multiprocessor, warps of each, and stages of the pipeline that loads ahead.

    `ahead`: keys that a program asks for while the launch before is ending; `lead`: keys left to read, a block at least,
    when a program lets the next launch start. Both matter only where launches overlap.
    `whole`: keys up to which a head is read by one program; `extra`: units of 16 keys that such a head counts more.
    None of it changes a result beyond rounding. A CPU (triton's interpreter) counts as one multiprocessor.
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
        """What was fastest on an H100: for several query heads a KV head the default, for one more programs.

        Blocks are so small that two programs fit a multiprocessor's shared memory.
        """
        block = cls.block
        while block > 16 and block * bytes_a_key * (cls.stages - 1) > SHARED_MEMORY:
            block //= 2
        return cls(block) if group > 1 else cls(block, programs_per_processor=4, extra=10)


class GroupSlots(NamedTuple):
    """KV heads of a layer that lie in one pair of tensors, contiguous `[batch, len(heads), slot, head_dim]`.

    They hold the first `min(capacity, seen)` slots (capacity None: all seen). The first `sinks` never move, the others
    are a ring: that matters in padded rows and to where a new column is stored. Head sizes of K and V may differ.
    """

    heads: Sequence[int]
    keys: Tensor
    values: Tensor
    capacity: int | None
    sinks: int = 0


def table_of(parts: Sequence[GroupSlots], heads: int) -> Tensor:
    """The kernel's int64 table `[heads, 6]` on the parts' device; heads in no part hold nothing.

    It names addresses: make it anew once a tensor has moved.
    """
    lines = [[0] * 6 for _ in range(heads)]
    for heads_of, keys, values, capacity, sinks in parts:
        for at, head in enumerate(heads_of):
            lines[head] = [keys[0, at].data_ptr(), values[0, at].data_ptr(), keys.stride(0), values.stride(0)]
            lines[head] += [UNBOUNDED if capacity is None else capacity, sinks]
    return torch.tensor(lines).to(parts[0].keys.device, non_blocking=True)


@dataclass
class Scratch:
    """Room for partial results, reused by launches on one stream; `arrivals` is all 0 between launches."""

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
    """Multiprocessors of a device; 0 for a GPU that is too old for the kernel."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if properties.major >= 8 else 0


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a device can start a launch while the one before is ending."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 9


@cache
def kernel() -> Any:
    """The kernel's module, or None (after a warning) where triton is there but cannot build anything."""
    try:
        from kvcompress.ops import ragged_decode_kernel
    except ImportError:
        return None
    if torch.cuda.is_available():
        import triton

        try:
            triton.runtime.driver.active.get_current_device()  # builds triton's own helper: needs a C compiler
        except Exception as error:
            warnings.warn(f"triton cannot be used, decoding goes group by group: {error}", stacklevel=2)
            return None
    return ragged_decode_kernel


def can_decode(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel can serve a query `[batch, kv_head, group, 1, head_dim]` and a cache of such K and V."""
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

    `table` is made by `table_of` from tensors of the query's dtype, at most 256 columns wide and of a multiple of 16
    bytes; the table's heads share the query heads equally. `seen` (int32 `[1]`) counts the columns in the cache, the
    query's own among them; `pads` (integers `[batch]`) those that are left padding. A head that holds nothing gives
    exactly 0, and so does a row of nothing but padding. Scores are multiplied by `scale`, head_dim ** -0.5 by default.
    `new`, the keys and values of the last column, `[batch, kv_head, head_dim]` each, are first stored in their slots
    (where `Group` has them, for one that is not a padded row's sink); without it they are there already. `settled` says
    that the launch before this one, on the same stream, writes none of `table`, `seen` and `pads`: then they are read
    while it is still ending, where the device can do that.

    Returns the scratch memory for the next call too: `scratch` itself if it was large enough.
    """
    batch, query_heads, size = query.shape
    heads, device = table.shape[0], query.device
    group = query_heads // heads
    key_large, key_small = _halves(size)
    # With fewer columns than rows in a product triton lets all warps do the same work.
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
    """The smallest power of two that is not below `least`."""
    return 1 << (least - 1).bit_length()


def _halves(size: int, least: int = 16) -> tuple[int, int]:
    """A head size as the sum of two powers of two from `least` up, or of one and 0, with as little to spare as can be."""
    whole = max(power_from(size), least)
    large = whole // 2
    small = max(power_from(size - large), least)
    return (large, small) if large >= least and size < whole and large + small < whole else (whole, 0)
