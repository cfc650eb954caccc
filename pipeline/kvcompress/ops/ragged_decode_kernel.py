"""The Triton kernel behind `decode`: one token's attention over all KV heads of a layer in one launch.

All keys form one line, of which each program takes an equal piece (`decode_line`), so a full head of 8,192 keys beside
window heads of 132 keeps every multiprocessor busy to the end. Inside its piece a program runs the online
softmax of FlashAttention-2 (arXiv 2307.08691), pair by pair. A pair that lies whole in one piece is written out at once.
Of a pair cut between programs each writes its partial result (as in Flash-Decoding), and whoever arrives last, by an
atomic counter, merges all of them in a fixed order: the result does not depend on who that was. It also sets the
counter back to 0, ready for the next launch.

The new key and value may come along: the one program that reads their unit stores them in their slot before it does.

Launches follow each other closely (programmatic dependent launch, from compute capability 9 on): a program starts while
the launch before is ending, finds its piece, asks for its first keys, and waits only then. In turn it lets the next
launch start a few keys before its own end, after having waited itself, so that no more than two launches ever overlap.

Lengths are made here from the device's own count of tokens seen, so a captured CUDA graph goes on being right as the
cache grows within its storage. Importing this file needs triton.
"""

import triton
import triton.language as tl

from kvcompress.ops.online_softmax import CAPACITY, FIELDS, UNBOUNDED, attend_blocks, fetch_ahead, merge_partial, put
from kvcompress.ops.work_partition import boundary_of, program_of


@triton.jit(do_not_specialize=["settled"])
def decode_heads(
    query,  # [batch, HEADS * GROUP, SIZE], elements of a head contiguous
    out,  # [batch, HEADS * GROUP, VALUE_SIZE], contiguous
    table,  # int64 [HEADS, FIELDS]
    seen,  # int32 [1], columns in the cache with the query's own
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
    scale,  # of the scores, times log2(e)
    whole,  # keys up to which a head is not cut
    extra,  # units that such a head counts in addition: its start and end cost as much as so many keys
    settled,  # 1 if the launch before this one writes none of table, seen and pads; read only if OVERLAP
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads a KV head
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    APPEND: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: triton's interpreter knows no product of bfloat16
    OVERLAP: tl.constexpr,  # start while the launch before is ending, which needs compute capability 9
    AHEAD: tl.constexpr,  # first keys that are asked for while that has not ended
    LEAD: tl.constexpr,  # keys left to read, at most, when the next launch may start
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
    held = tl.minimum(capacity, length)
    # An empty head has a unit too, without keys: someone must write its zeros.
    uncut = tl.where(held <= whole, 1, 0)
    units = tl.where(heads < HEADS, tl.maximum(tl.cdiv(held, UNIT), 1) + extra * uncut, 0)
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
    low, first_pair, first_start = boundary_of(
        program,
        all_units,
        heads,
        units,
        uncut,
        rows,
        row_units,
        row_skips,
        unbounded,
        a_row,
        batch,
        HEADS,
        PADDED,
    )
    high, last_pair, last_start = boundary_of(
        program + 1,
        all_units,
        heads,
        units,
        uncut,
        rows,
        row_units,
        row_skips,
        unbounded,
        a_row,
        batch,
        HEADS,
        PADDED,
    )
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
        tl.extra.cuda.gdc_wait()  # what follows reads what the launch before wrote, and writes what it read

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

        top, total, large, small = attend_blocks(
            query + tl.cast(row, tl.int64) * query_row + head * GROUP * query_head,
            new_keys + tl.cast(row, tl.int64) * key_row + head * key_head,
            new_values + tl.cast(row, tl.int64) * value_row + head * value_head,
            table + head * FIELDS,
            tl.cast(row, tl.int64),
            tl.maximum(low, start) - start + skip,
            tl.minimum(high, end) - start + skip,
            tl.where(pair == last_pair, LEAD, -UNBOUNDED),
            length,
            pad,
            query_head,
            scale,
            GROUP,
            SIZE,
            VALUE_SIZE,
            PADDED,
            APPEND,
            WIDE,
            UNIT,
            BLOCK,
            ROWS,
            KEY_LARGE,
            KEY_SMALL,
            VALUE_LARGE,
            VALUE_SMALL,
            OVERLAP,
        )

        result = out + tl.cast(pair, tl.int64) * GROUP * VALUE_SIZE
        if (low <= start) & (end <= high):
            inverse = (1.0 / tl.where(total > 0, total, 1.0))[:, None]
            put(result, large * inverse, 0, GROUP, VALUE_SIZE)
            if VALUE_SMALL > 0:
                put(result, small * inverse, VALUE_LARGE, GROUP, VALUE_SIZE)
        else:
            # Of the two places of a program, the second is for a pair that begins in it, the first for one that does
            # not; it has at most one cut pair of either kind.
            place = 2 * program + tl.where(low <= start, 1, 0)
            line = tl.arange(0, ROWS)
            tl.store(stats + place * 2 * GROUP + line, top, mask=line < GROUP)
            tl.store(stats + (place * 2 + 1) * GROUP + line, total, mask=line < GROUP)
            own = partial + place * GROUP * VALUE_SIZE
            put(own, large, 0, GROUP, VALUE_SIZE)
            if VALUE_SMALL > 0:
                put(own, small, VALUE_LARGE, GROUP, VALUE_SIZE)
            first, last = program_of(start, all_units), program_of(end - 1, all_units)
            # All threads have stored before one of them releases the stores with the count; who counts last acquires
            # the others' stores, and the value's way back to all threads is a barrier again.
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
