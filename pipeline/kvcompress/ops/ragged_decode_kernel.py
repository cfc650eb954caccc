"""Triton kernel of `decode`: attention of one token over all KV heads of a layer in one launch.

The keys of a (row, KV head) pair are cut into units, and the units of all pairs form one line. Each program takes an
equal piece of that line (the idea of Stream-K, arXiv 2301.03598), so a full head of 8,192 keys next to window heads
of 132 keeps every multiprocessor busy to the end. A pair of few keys is never cut, because merging partial results
takes longer than reading it: a boundary inside such a pair moves to its start.

Inside its piece a program runs the online softmax of FlashAttention-2 (arXiv 2307.08691), pair by pair. A pair that
lies whole in one piece is written out at once. For a pair cut between programs, each program writes a partial result
(as in Flash-Decoding). The last to arrive, by an atomic counter, merges all of them in a fixed order, so the result
does not depend on the order of arrival. It also resets the counter to 0 for the next launch.

With APPEND, the one program that reads the unit of the new key and value first stores them in their slot.

Launches follow each other closely (programmatic dependent launch, compute capability 9 and above). A program starts
while the previous launch is ending, finds its piece, prefetches its first keys, and only then waits. It allows the
next launch to start a few keys before its own end, after its own wait, so that at most two launches ever overlap.

Lengths come from the device's own count of tokens seen, so a captured CUDA graph stays valid as the cache grows
within its storage. Exponentials are powers of 2; the scale of the scores contains log2(e). Columns of a head come in
a large and a small power of two: a head of 80 costs 64 + 16, not 128. Importing this file needs triton.
"""

import triton
import triton.language as tl

# A head's line in the table: addresses of K and V (row 0 of the batch), elements from one row of the batch to the next
# in each, capacity in slots, and number of sinks.
FIELDS = tl.constexpr(6)
CAPACITY, SINKS = tl.constexpr(4), tl.constexpr(5)
UNBOUNDED = tl.constexpr(2**31 - 1)  # capacity of a head that grows with the text


@triton.jit(do_not_specialize=["settled"])
def decode_heads(
    query,  # [batch, HEADS * GROUP, SIZE], elements of a head contiguous
    out,  # [batch, HEADS * GROUP, VALUE_SIZE], contiguous
    table,  # int64 [HEADS, FIELDS]
    seen,  # int32 [1], columns in the cache, the query's own included
    pads,  # integers [batch], pad columns of each row; read only if PADDED
    new_keys,  # [batch, HEADS, SIZE], the last column, stored first if APPEND; elements of a head contiguous
    new_values,  # [batch, HEADS, VALUE_SIZE]
    partial,  # float32 [programs, 2, GROUP, VALUE_SIZE], unnormalised sums of values
    stats,  # float32 [programs, 2, 2, GROUP], largest score (in powers of 2) and sum of weights
    arrivals,  # int32 [batch * HEADS], 0 between launches
    batch,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    scale,  # multiplies scores; contains log2(e)
    whole,  # keys up to which a head is not cut
    extra,  # units added to such a head for the cost of its start and end
    settled,  # 1 if the previous launch writes none of table, seen and pads; read only if OVERLAP
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads a KV head
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    APPEND: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: triton's interpreter has no product of bfloat16
    OVERLAP: tl.constexpr,  # start while the previous launch is ending; compute capability 9 and above
    AHEAD: tl.constexpr,  # keys to prefetch while the previous launch has not ended
    LEAD: tl.constexpr,  # at most so many keys are left to read when the next launch may start
    UNIT: tl.constexpr,  # keys a unit of the line
    BLOCK: tl.constexpr,  # keys a block
    # Powers of two: rows of a matrix product, query heads, KV heads and batch rows, each with room to spare; columns
    # of a head in a large and a small part (80 = 64 + 16), no small part where that is 0; partial results at a time.
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    HEADS_SPAN: tl.constexpr,
    BATCH_SPAN: tl.constexpr,
    KEY_LARGE: tl.constexpr,
    KEY_SMALL: tl.constexpr,
    VALUE_LARGE: tl.constexpr,
    VALUE_SMALL: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):
    if OVERLAP:  # noqa: SIM102
        if settled == 0:
            tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    length = tl.load(seen)
    heads = tl.arange(0, HEADS_SPAN)
    capacity = tl.load(table + heads * FIELDS + CAPACITY, mask=heads < HEADS, other=0).to(tl.int32)
    filled_slots = tl.minimum(capacity, length)
    # An empty head has a unit too, without keys, so that a program writes its zeros.
    uncut = tl.where(filled_slots <= whole, 1, 0)
    units = tl.where(heads < HEADS, tl.maximum(tl.cdiv(filled_slots, UNIT), 1) + extra * uncut, 0)
    a_row = tl.sum(units)  # units of a row without padding
    row_units, row_skips, unbounded = a_row, 0, 0
    rows = tl.arange(0, BATCH_SPAN)
    if PADDED:
        # An unbounded head of a padded row begins with the unit of its first real token.
        unbounded = tl.where(capacity == UNBOUNDED, 1, 0)
        row_skips = tl.load(pads + rows, mask=rows < batch, other=0).to(tl.int32) // UNIT
        row_skips = tl.minimum(row_skips, tl.cdiv(length, UNIT) - 1)
        row_units = tl.where(rows < batch, a_row - row_skips * tl.sum(unbounded), 0)
        all_units = tl.sum(row_units)
    else:
        all_units = a_row * batch
    work = all_units, a_row, batch, heads, units, uncut, unbounded, rows, row_units, row_skips
    low, first_pair, first_start = boundary_of(program, work, HEADS, PADDED)
    high, last_pair, last_start = boundary_of(program + 1, work, HEADS, PADDED)
    if low >= high:
        return
    last_pair -= tl.where(high == last_start, 1, 0)
    if OVERLAP:
        fetch_ahead(
            query,
            table + first_pair % HEADS * FIELDS,
            first_pair // HEADS,
            (low - first_start) * UNIT,
            length,
            SIZE,
            VALUE_SIZE,
            AHEAD,
        )
        tl.extra.cuda.gdc_wait()  # from here on memory of the previous launch is read and overwritten

    for pair in range(first_pair, last_pair + 1):
        row, head = pair // HEADS, pair % HEADS
        start = row * a_row
        own_units = units
        skip = 0
        pad = 0
        if PADDED:
            skip = tl.sum(tl.where(rows == row, row_skips, 0))
            own_units = units - skip * unbounded
            start = tl.sum(tl.where(rows < row, row_units, 0))
            skip = skip * tl.sum(tl.where(heads == head, unbounded, 0))
            pad = tl.load(pads + row).to(tl.int32)
        start += tl.sum(tl.where(heads < head, own_units, 0))
        end = start + tl.sum(tl.where(heads == head, own_units, 0))

        # Query heads of the pair, and the units of its keys that lie in this program's piece.
        row64 = tl.cast(row, tl.int64)
        asking = query + row64 * query_row + head * GROUP * query_head
        new_key = new_keys + row64 * key_row + head * key_head
        new_value = new_values + row64 * value_row + head * value_head
        entry = table + head * FIELDS
        begin = tl.maximum(low, start) - start + skip
        stop = tl.minimum(high, end) - start + skip
        lead = tl.where(pair == last_pair, LEAD, -UNBOUNDED)
        kind = query.dtype.element_ty
        product = tl.float32 if WIDE else kind
        keys = tl.load(entry).to(tl.pointer_type(kind)) + tl.load(entry + 2) * row64
        values = tl.load(entry + 1).to(tl.pointer_type(kind)) + tl.load(entry + 3) * row64
        keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
        slots = tl.load(entry + CAPACITY).to(tl.int32)
        filled = tl.minimum(slots, length)
        group = tl.arange(0, ROWS)
        query_large = take(asking, group, query_head, group < GROUP, 0, KEY_LARGE, SIZE).to(product)
        if KEY_SMALL > 0:
            query_small = take(asking, group, query_head, group < GROUP, KEY_LARGE, KEY_SMALL, SIZE).to(product)
        if PADDED or APPEND:
            sinks = tl.load(entry + SINKS).to(tl.int32)
            window = tl.maximum(slots - sinks, 1)
        if APPEND:  # the slot rule of the cache's head groups
            newest = length - 1
            free = tl.where(newest < slots, newest, sinks + (newest - sinks) % window)
            if (filled > 0) & (begin <= free // UNIT) & (free // UNIT < stop):
                copy(keys + free * SIZE, new_key, SIZE, KEY_LARGE if KEY_SMALL == 0 else 2 * KEY_LARGE)
                copy(
                    values + free * VALUE_SIZE,
                    new_value,
                    VALUE_SIZE,
                    VALUE_LARGE if VALUE_SMALL == 0 else 2 * VALUE_LARGE,
                )
                tl.debug_barrier()  # other threads of this program read it

        # Online softmax over these keys, a block at a time.
        top = tl.full([ROWS], float("-inf"), tl.float32)
        totals = tl.zeros([ROWS, BLOCK], tl.float32)  # summed over the columns at the end: a sum a block costs barriers
        large = tl.zeros([ROWS, VALUE_LARGE], tl.float32)
        small = tl.zeros([ROWS, VALUE_SMALL if VALUE_SMALL > 0 else 1], tl.float32)
        last_slot = tl.minimum(stop * UNIT, filled)
        for first in range(begin * UNIT, last_slot, BLOCK):
            if OVERLAP:
                allow_next_launch(first + lead >= last_slot)
            slot = first + tl.arange(0, BLOCK)
            there = slot < last_slot
            if PADDED:  # the column in each slot, by the cache's slot rule
                column = length - 1 - (length - 1 - slot) % window
                there = there & tl.where(slot < sinks, slot + pad < length, column >= pad + sinks)
            key = take(keys, slot, SIZE, there, 0, KEY_LARGE, SIZE).to(product)
            scores = tl.dot(query_large, tl.trans(key), input_precision="ieee")
            if KEY_SMALL > 0:
                key = take(keys, slot, SIZE, there, KEY_LARGE, KEY_SMALL, SIZE).to(product)
                scores = tl.dot(query_small, tl.trans(key), acc=scores, input_precision="ieee")
            scores = tl.where(there[None, :], scores * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - -inf would be NaN
            weights = tl.exp2(scores - level[:, None])
            fade = tl.exp2(top - level)
            top = higher
            totals = totals * fade[:, None] + weights
            weights = weights.to(kind).to(product)
            value = take(values, slot, VALUE_SIZE, there, 0, VALUE_LARGE, VALUE_SIZE).to(product)
            large = tl.dot(weights, value, acc=large * fade[:, None], input_precision="ieee")
            if VALUE_SMALL > 0:
                value = take(values, slot, VALUE_SIZE, there, VALUE_LARGE, VALUE_SMALL, VALUE_SIZE).to(product)
                small = tl.dot(weights, value, acc=small * fade[:, None], input_precision="ieee")
        total = tl.sum(totals, 1)

        result = out + tl.cast(pair, tl.int64) * GROUP * VALUE_SIZE
        if (low <= start) & (end <= high):
            inverse = (1.0 / tl.where(total > 0, total, 1.0))[:, None]
            put(result, large * inverse, 0, GROUP, VALUE_SIZE)
            if VALUE_SMALL > 0:
                put(result, small * inverse, VALUE_LARGE, GROUP, VALUE_SIZE)
        else:
            # A program has two places: the second for a cut pair that begins in its piece, the first for a cut pair
            # that began before. It has at most one of each.
            place = 2 * program + tl.where(low <= start, 1, 0)
            tl.store(stats + place * 2 * GROUP + group, top, mask=group < GROUP)
            tl.store(stats + (place * 2 + 1) * GROUP + group, total, mask=group < GROUP)
            own = partial + place * GROUP * VALUE_SIZE
            put(own, large, 0, GROUP, VALUE_SIZE)
            if VALUE_SMALL > 0:
                put(own, small, VALUE_LARGE, GROUP, VALUE_SIZE)
            first, last = program_of(start, all_units), program_of(end - 1, all_units)
            # All threads have stored before one of them releases the stores with the count. The last program to
            # count acquires the others' stores; broadcasting the count to all threads is a barrier again.
            tl.debug_barrier()
            before = tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu")
            if before == last - first:
                tl.debug_barrier()
                merge_partial(
                    result,
                    partial,
                    stats,
                    first,
                    last - first + 1,
                    GROUP,
                    VALUE_SIZE,
                    SPAN,
                    VALUE_LARGE,
                    VALUE_SMALL,
                    AT_A_TIME,
                )
                tl.store(arrivals + pair, 0)


@triton.jit
def boundary_of(program, work, HEADS: tl.constexpr, PADDED: tl.constexpr):
    """First unit of a program's piece, the pair at that unit, and the pair's first unit.

    work: all units, units of a row without padding, and the batch size; per KV head its units, 1 if it is never cut and
    1 if it is unbounded; per row its number, its units and the units of padding that its unbounded heads skip. The last
    two are read only if PADDED.
    """
    all_units, a_row, batch, heads, units, uncut, unbounded, rows, row_units, row_skips = work
    share, longer = all_units // tl.num_programs(0), all_units % tl.num_programs(0)
    boundary = program * share + tl.minimum(program, longer)
    if PADDED:
        row = tl.minimum(tl.sum(tl.where(tl.cumsum(row_units) <= boundary, 1, 0)), batch)
        start = tl.sum(tl.where(rows < row, row_units, 0))
        own = units - tl.sum(tl.where(rows == row, row_skips, 0)) * unbounded
    else:
        row = boundary // a_row
        start = row * a_row
        own = units
    head = tl.sum(tl.where(start + tl.cumsum(own) <= boundary, 1, 0))
    start += tl.sum(tl.where(heads < head, own, 0))
    boundary = tl.where(tl.sum(tl.where(heads == head, uncut, 0)) > 0, start, boundary)
    return boundary, row * HEADS + head, start


@triton.jit
def program_of(unit, all_units):
    """Program that has a unit of a pair that may be cut."""
    share, longer = all_units // tl.num_programs(0), all_units % tl.num_programs(0)
    in_longer = unit // (share + 1)
    return tl.where(in_longer < longer, in_longer, longer + (unit - longer * (share + 1)) // tl.maximum(share, 1))


@triton.jit
def fetch_ahead(query, entry, row, first, seen, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Prefetch up to KEYS keys and values of a KV head, from slot `first` on, into L2."""
    width: tl.constexpr = query.dtype.element_ty.primitive_bitwidth // 8
    count = tl.minimum(tl.minimum(tl.load(entry + CAPACITY).to(tl.int32), seen) - first, KEYS)
    row, first = tl.cast(row, tl.int64) * width, tl.cast(first, tl.int64)
    prefetch(tl.load(entry) + tl.load(entry + 2) * row + first * (SIZE * width), count * (SIZE * width))
    prefetch(tl.load(entry + 1) + tl.load(entry + 3) * row + first * (VALUE_SIZE * width), count * (VALUE_SIZE * width))


@triton.jit
def allow_next_launch(now):
    """Allow the next launch; its programs start once all programs of this launch have allowed it or ended."""
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
def prefetch(address, size):
    """Prefetch `size` bytes, a multiple of 16 or none, into L2 by one thread."""
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
    """Merge the partial results of `count` programs, from program `first` on, into one softmax."""
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
        sums = gather(lines, there, 0, VALUE_LARGE, VALUE_SIZE)
        if VALUE_SMALL > 0:
            small_sums = gather(lines, there, VALUE_LARGE, VALUE_SMALL, VALUE_SIZE)
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
def take(base, line, stride, there, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Load columns `FIRST...FIRST + WIDTH` of some lines, 0 where a line is hidden or shorter."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = there[:, None]
    if FIRST + WIDTH > SIZE:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(base + line[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def gather(lines, there, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Load columns of lines `[program, query head]` that other programs wrote, past the L1 cache."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = there[:, :, None]
    if FIRST + WIDTH > SIZE:
        mask = mask & (column < SIZE)[None, None, :]
    return tl.load(lines[:, :, None] + column[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def copy(target, source, SIZE: tl.constexpr, SPAN: tl.constexpr):
    """Copy one vector of SIZE elements."""
    column = tl.arange(0, SPAN)
    tl.store(target + column, tl.load(source + column, mask=column < SIZE), mask=column < SIZE)


@triton.jit
def put(base, sums, FIRST: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """Store columns `FIRST...` of the query heads of a KV head, contiguous lines of SIZE."""
    line = tl.arange(0, sums.shape[0])
    column = FIRST + tl.arange(0, sums.shape[1])
    mask = (line < GROUP)[:, None] & (column < SIZE)[None, :]
    tl.store(base + line[:, None] * SIZE + column[None, :], sums.to(base.dtype.element_ty), mask=mask)
