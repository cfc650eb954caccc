"""The Triton kernel behind `decode`: one token's attention over all KV heads of a layer in one launch.

The keys of a (row, KV head) pair are cut into blocks, and the blocks of all pairs, one pair after the other, form one
line. Each program takes an equal piece of the line, so a full head of 8,192 keys beside window heads of 132 keeps every
multiprocessor busy to the end (the idea of Stream-K, arXiv 2301.03598). Inside its piece a program runs the online
softmax of FlashAttention-2 (arXiv 2307.08691), pair by pair. A pair that lies whole in one piece is written out at once.
Of a pair cut between programs each writes its partial result (as in Flash-Decoding), and whoever arrives last, by an
atomic counter, merges all of them in a fixed order: the result does not depend on who that was. It also sets the
counter back to 0, ready for the next launch.

The new key and value may come along: the one program that reads their block stores them in their slot before it does.

Lengths are made here from the device's own count of tokens seen, so a captured CUDA graph goes on being right as the
cache grows within its blocks. Importing this file needs triton.
"""

import triton
import triton.language as tl

from kvcompress.cache.decode_softmax import CAPACITY, FIELDS, UNBOUNDED, attend_blocks, merge_partial, put


@triton.jit
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
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads a KV head
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    APPEND: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: triton's interpreter knows no product of bfloat16
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
    program = tl.program_id(0)
    length = tl.load(seen)
    heads = tl.arange(0, HEADS_SPAN)
    capacity = tl.load(table + heads * FIELDS + CAPACITY, mask=heads < HEADS, other=0).to(tl.int32)
    held = tl.minimum(capacity, length)
    # An empty head has a block too, without keys: someone must write its zeros.
    blocks = tl.where(heads < HEADS, tl.maximum(tl.cdiv(held, BLOCK), 1), 0)
    a_row = tl.sum(blocks)  # blocks of a row without padding
    rows = tl.arange(0, BATCH_SPAN)
    if PADDED:
        # An unbounded head of a padded row begins with the block of its first real token.
        unbounded = tl.where(capacity == UNBOUNDED, 1, 0)
        row_skips = tl.load(pads + rows, mask=rows < batch, other=0).to(tl.int32) // BLOCK
        row_skips = tl.minimum(row_skips, tl.cdiv(length, BLOCK) - 1)
        row_blocks = tl.where(rows < batch, a_row - row_skips * tl.sum(unbounded), 0)
        all_blocks = tl.sum(row_blocks)
    else:
        all_blocks = a_row * batch
    # The first `longer` programs take `share + 1` blocks, the others `share`.
    share, longer = all_blocks // tl.num_programs(0), all_blocks % tl.num_programs(0)
    low = program * share + tl.minimum(program, longer)
    high = low + share + tl.where(program < longer, 1, 0)
    if low >= high:
        return

    if PADDED:
        row_ends = tl.cumsum(row_blocks)
        first_row = tl.sum(tl.where(row_ends <= low, 1, 0))
        last_row = tl.sum(tl.where(row_ends < high, 1, 0))
        first_skip = tl.sum(tl.where(rows == first_row, row_skips, 0))
        last_skip = tl.sum(tl.where(rows == last_row, row_skips, 0))
        first_ends = tl.cumsum(blocks - first_skip * unbounded)
        last_ends = tl.cumsum(blocks - last_skip * unbounded)
        first_start = tl.sum(tl.where(rows < first_row, row_blocks, 0))
        last_start = tl.sum(tl.where(rows < last_row, row_blocks, 0))
    else:
        first_row, last_row = low // a_row, (high - 1) // a_row
        first_ends = tl.cumsum(blocks)
        last_ends = first_ends
        first_start, last_start = first_row * a_row, last_row * a_row
    first_pair = first_row * HEADS + tl.sum(tl.where(first_start + first_ends <= low, 1, 0))
    last_pair = last_row * HEADS + tl.sum(tl.where(last_start + last_ends < high, 1, 0))

    for pair in range(first_pair, last_pair + 1):
        row, head = pair // HEADS, pair % HEADS
        start = row * a_row
        own_blocks = blocks
        skip = 0
        pad = 0
        if PADDED:
            skip = tl.sum(tl.where(rows == row, row_skips, 0))
            own_blocks = blocks - skip * unbounded
            start = tl.sum(tl.where(rows < row, row_blocks, 0))
            skip = skip * tl.sum(tl.where(heads == head, unbounded, 0))
            pad = tl.load(pads + row).to(tl.int32)
        start += tl.sum(tl.where(heads < head, own_blocks, 0))
        end = start + tl.sum(tl.where(heads == head, own_blocks, 0))

        top, total, large, small = attend_blocks(
            query + tl.cast(row, tl.int64) * query_row + head * GROUP * query_head,
            new_keys + tl.cast(row, tl.int64) * key_row + head * key_head,
            new_values + tl.cast(row, tl.int64) * value_row + head * value_head,
            table + head * FIELDS,
            tl.cast(row, tl.int64),
            tl.maximum(low, start) - start + skip,
            tl.minimum(high, end) - start + skip,
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
            BLOCK,
            ROWS,
            KEY_LARGE,
            KEY_SMALL,
            VALUE_LARGE,
            VALUE_SMALL,
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
            first, last = _program_of(start, share, longer), _program_of(end - 1, share, longer)
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


@triton.jit
def _program_of(block, share, longer):
    """Which program has a block of the line."""
    in_longer = block // (share + 1)
    return tl.where(in_longer < longer, in_longer, longer + (block - longer * (share + 1)) // tl.maximum(share, 1))
