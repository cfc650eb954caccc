"""Softmax within the decode kernel: over a piece of a head's keys, and merged from the results of several pieces.

Both keep the running maximum of the scores and rescale what was summed before a larger one came (online softmax,
arXiv 1805.02867); exponentials are powers of 2, the scale of the scores contains log2(e). Columns of a head come in a
large and a small power of two, so that a head of 80 costs 64 + 16 and not 128.
"""

import triton
import triton.language as tl

# A head's line in the table: addresses of K and V (row 0 of the batch), elements from one row of the batch to the next
# in each, most slots it may hold, and how many of them are sinks.
FIELDS = tl.constexpr(6)
CAPACITY, SINKS = tl.constexpr(4), tl.constexpr(5)
UNBOUNDED = tl.constexpr(2**31 - 1)  # the capacity of a head that grows with the text


@triton.jit
def attend_blocks(
    query,
    new_key,
    new_value,
    line,
    row,
    begin,
    end,
    lead,
    seen,
    pad,
    query_head,
    scale,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    APPEND: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_LARGE: tl.constexpr,
    KEY_SMALL: tl.constexpr,
    VALUE_LARGE: tl.constexpr,
    VALUE_SMALL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Online softmax of a KV head's query heads over its units `begin...end`: top, total, sums of values."""
    kind = query.dtype.element_ty
    product = tl.float32 if WIDE else kind
    keys = tl.load(line).to(tl.pointer_type(kind)) + tl.load(line + 2) * row
    values = tl.load(line + 1).to(tl.pointer_type(kind)) + tl.load(line + 3) * row
    keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
    capacity = tl.load(line + CAPACITY).to(tl.int32)
    length = tl.minimum(capacity, seen)
    group = tl.arange(0, ROWS)
    query_large = _take(query, group, query_head, group < GROUP, 0, KEY_LARGE, SIZE).to(product)
    if KEY_SMALL > 0:
        query_small = _take(query, group, query_head, group < GROUP, KEY_LARGE, KEY_SMALL, SIZE).to(product)
    if PADDED or APPEND:
        sinks = tl.load(line + SINKS).to(tl.int32)
        window = tl.maximum(capacity - sinks, 1)
    if APPEND:  # `Group` says the same in torch
        last = seen - 1
        free = tl.where(last < capacity, last, sinks + (last - sinks) % window)
        if (length > 0) & (begin <= free // UNIT) & (free // UNIT < end):
            _copy(keys + free * SIZE, new_key, SIZE, KEY_LARGE if KEY_SMALL == 0 else 2 * KEY_LARGE)
            _copy(
                values + free * VALUE_SIZE, new_value, VALUE_SIZE, VALUE_LARGE if VALUE_SMALL == 0 else 2 * VALUE_LARGE
            )
            tl.debug_barrier()  # other threads of this program read it
    top = tl.full([ROWS], float("-inf"), tl.float32)
    totals = tl.zeros([ROWS, BLOCK], tl.float32)  # summed over the columns at the end: a sum a block costs barriers
    large = tl.zeros([ROWS, VALUE_LARGE], tl.float32)
    small = tl.zeros([ROWS, VALUE_SMALL if VALUE_SMALL > 0 else 1], tl.float32)
    last_slot = tl.minimum(end * UNIT, length)
    for first in range(begin * UNIT, last_slot, BLOCK):
        if OVERLAP:
            let_next_begin(first + lead >= last_slot)
        slot = first + tl.arange(0, BLOCK)
        there = slot < last_slot
        if PADDED:  # `Group.positions` says the same in torch
            column = seen - 1 - (seen - 1 - slot) % window
            there = there & tl.where(slot < sinks, slot + pad < seen, column >= pad + sinks)
        key = _take(keys, slot, SIZE, there, 0, KEY_LARGE, SIZE).to(product)
        scores = tl.dot(query_large, tl.trans(key), input_precision="ieee")
        if KEY_SMALL > 0:
            key = _take(keys, slot, SIZE, there, KEY_LARGE, KEY_SMALL, SIZE).to(product)
            scores = tl.dot(query_small, tl.trans(key), acc=scores, input_precision="ieee")
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - -inf would be NaN
        weights = tl.exp2(scores - level[:, None])
        fade = tl.exp2(top - level)
        top = higher
        totals = totals * fade[:, None] + weights
        weights = weights.to(kind).to(product)
        value = _take(values, slot, VALUE_SIZE, there, 0, VALUE_LARGE, VALUE_SIZE).to(product)
        large = tl.dot(weights, value, acc=large * fade[:, None], input_precision="ieee")
        if VALUE_SMALL > 0:
            value = _take(values, slot, VALUE_SIZE, there, VALUE_LARGE, VALUE_SMALL, VALUE_SIZE).to(product)
            small = tl.dot(weights, value, acc=small * fade[:, None], input_precision="ieee")
    return top, tl.sum(totals, 1), large, small


@triton.jit
def fetch_ahead(query, line, row, first, seen, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Ask for the first keys and values of a KV head from slot `first` on: they are in L2 when they are read."""
    width: tl.constexpr = query.dtype.element_ty.primitive_bitwidth // 8
    count = tl.minimum(tl.minimum(tl.load(line + CAPACITY).to(tl.int32), seen) - first, KEYS)
    row, first = tl.cast(row, tl.int64) * width, tl.cast(first, tl.int64)
    ask(tl.load(line) + tl.load(line + 2) * row + first * (SIZE * width), count * (SIZE * width))
    ask(tl.load(line + 1) + tl.load(line + 3) * row + first * (VALUE_SIZE * width), count * (VALUE_SIZE * width))


@triton.jit
def let_next_begin(now):
    """Let the programs of the next launch begin once all of this one have said so, or ended."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred now;
        setp.ne.s32 now, $1, 0;
        @now griddepcontrol.launch_dependents;
        mov.u32 $0, 0;
        }""",
        "=r,r",
        [now.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def ask(address, size):
    """Let one thread ask for some bytes, a multiple of 16 or none, to be brought into L2."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred asks;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 asks, thread, 0;
        setp.gt.and.s32 asks, $2, 0, asks;
        @asks cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def merge_partial(
    result,
    partial,
    stats,
    first,
    count,
    GROUP: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    VALUE_LARGE: tl.constexpr,
    VALUE_SMALL: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):
    """One softmax out of the partial results of `count` programs from `first` on."""
    group = tl.arange(0, SPAN)
    top = tl.full([SPAN], float("-inf"), tl.float32)
    total = tl.zeros([SPAN], tl.float32)
    large = tl.zeros([SPAN, VALUE_LARGE], tl.float32)
    small = tl.zeros([SPAN, VALUE_SMALL if VALUE_SMALL > 0 else 1], tl.float32)
    for begin in range(0, count, AT_A_TIME):
        index = begin + tl.arange(0, AT_A_TIME)
        place = 2 * (first + index) + tl.where(index == 0, 1, 0)
        there = (index < count)[:, None] & (group < GROUP)[None, :]
        at = stats + place[:, None] * 2 * GROUP + group[None, :]
        tops = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(at + GROUP, mask=there, other=0.0, cache_modifier=".cg")
        lines = partial + (place[:, None] * GROUP + group[None, :]) * VALUE_SIZE
        sums = _gather(lines, there, 0, VALUE_LARGE, VALUE_SIZE)
        if VALUE_SMALL > 0:
            small_sums = _gather(lines, there, VALUE_LARGE, VALUE_SMALL, VALUE_SIZE)
        higher = tl.maximum(top, tl.max(tops, 0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(tops - level[None, :])
        fade = tl.exp2(top - level)
        top = higher
        total = total * fade + tl.sum(weights * totals, 0)
        large = large * fade[:, None] + tl.sum(sums * weights[:, :, None], 0)
        if VALUE_SMALL > 0:
            small = small * fade[:, None] + tl.sum(small_sums * weights[:, :, None], 0)
    inverse = (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    put(result, large * inverse, 0, GROUP, VALUE_SIZE)
    if VALUE_SMALL > 0:
        put(result, small * inverse, VALUE_LARGE, GROUP, VALUE_SIZE)


@triton.jit
def _take(base, line, stride, there, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Columns `FIRST...FIRST + WIDTH` of some lines, 0 where they are hidden or end before."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = there[:, None]
    if FIRST + WIDTH > SIZE:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(base + line[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _gather(lines, there, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """As `_take`, from lines in two dimensions that other programs wrote."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = there[:, :, None]
    if FIRST + WIDTH > SIZE:
        mask = mask & (column < SIZE)[None, None, :]
    return tl.load(lines[:, :, None] + column[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _copy(target, source, SIZE: tl.constexpr, SPAN: tl.constexpr):
    column = tl.arange(0, SPAN)
    tl.store(target + column, tl.load(source + column, mask=column < SIZE), mask=column < SIZE)


@triton.jit
def put(base, sums, FIRST: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """Store the columns `FIRST...` of the query heads of a KV head, contiguous lines of SIZE."""
    line = tl.arange(0, sums.shape[0])
    column = FIRST + tl.arange(0, sums.shape[1])
    mask = (line < GROUP)[:, None] & (column < SIZE)[None, :]
    tl.store(base + line[:, None] * SIZE + column[None, :], sums.to(base.dtype.element_ty), mask=mask)
