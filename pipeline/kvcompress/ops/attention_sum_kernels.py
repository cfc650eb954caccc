"""Triton kernels of the scores that sum up attention: weights are made inside a program and never stored.

They serve half precision, whose products a GPU multiplies as they are and adds up in float32, on a text whose keys and
queries are all there, column by column. Keys and queries `[batch, head, row, SIZE]` come with the elements from one batch,
one head and one row to the next, and within a row one by one; all else is contiguous. Weights are powers of 2, so `scale`,
which multiplies products of queries and keys, has log2(e) in it. Importing this file needs triton; `launches` calls.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-3.4e38)  # finite: where all keys are hidden, weights must not become NaN


@triton.jit
def of_head(vectors, to_batch, to_head, number, head, BY: tl.constexpr):
    """Where head `head` of `[batch, number * BY, ...]` begins, heads counted through all batches."""
    head = tl.cast(head, tl.int64)
    return vectors + head // (number * BY) * to_batch + head % (number * BY) * to_head


@triton.jit
def rows_of(vectors, row, to_row, inside, SIZE: tl.constexpr, SIZE_SPAN: tl.constexpr, WIDE: tl.constexpr):
    """Vectors number `row` of one head, `[row, SIZE_SPAN]`, 0 where they are not inside."""
    element = tl.arange(0, SIZE_SPAN)
    at = vectors + tl.cast(row, tl.int64)[:, None] * to_row + element[None, :]
    found = tl.load(at, mask=inside[:, None] & (element[None, :] < SIZE), other=0.0)
    return found.to(tl.float32) if WIDE else found


@triton.jit
def columns_of(vectors, column, to_row, inside, SIZE: tl.constexpr, SIZE_SPAN: tl.constexpr, WIDE: tl.constexpr):
    """The same transposed, `[SIZE_SPAN, column]`."""
    element = tl.arange(0, SIZE_SPAN)
    at = vectors + tl.cast(column, tl.int64)[None, :] * to_row + element[:, None]
    found = tl.load(at, mask=inside[None, :] & (element[:, None] < SIZE), other=0.0)
    return found.to(tl.float32) if WIDE else found


@triton.jit
def among_neighbours(
    queries,  # [batch, heads * GROUP, count, SIZE]
    query_batch,
    query_head,
    query_row,
    keys,  # [batch, heads, count, SIZE]
    key_batch,
    key_head,
    key_row,
    there,  # bool [batch * heads, count]
    out,  # float32 [batch * heads, count]
    heads,
    count,
    scale,
    GROUP: tl.constexpr,  # query heads a KV head
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,  # positions in a chunk
    WIDE: tl.constexpr,  # multiply in float32: triton's interpreter knows no product of bfloat16
    ROWS: tl.constexpr,  # queries at a time
    CHUNK_SPAN: tl.constexpr,  # powers of two that reach over the chunk ...
    SIZE_SPAN: tl.constexpr,  # ... and over the head
):
    """One chunk of one KV head: its queries' attention to its keys, without a causal mask, summed over queries."""
    head = tl.cast(tl.program_id(1), tl.int64)
    first = tl.program_id(0) * CHUNK
    asking = tl.minimum(CHUNK, count - first)
    place = tl.arange(0, CHUNK_SPAN)
    at = head * count + first + place
    one = tl.load(there + at, mask=place < asking, other=0).to(tl.int1)
    own = of_head(keys, key_batch, key_head, heads, head, 1)
    key = columns_of(own, first + place, key_row, place < asking, SIZE, SIZE_SPAN, WIDE)
    total = tl.zeros([ROWS, CHUNK_SPAN], dtype=tl.float32)
    for step in range(0, GROUP * tl.cdiv(asking, ROWS)):
        row = step // GROUP * ROWS + tl.arange(0, ROWS)
        of = of_head(queries, query_batch, query_head, heads, head * GROUP + step % GROUP, GROUP)
        query = rows_of(of, first + row, query_row, row < asking, SIZE, SIZE_SPAN, WIDE)
        score = tl.where(one[None, :], tl.dot(query, key) * scale, HIDDEN)
        weight = tl.exp2(score - tl.max(score, 1)[:, None])
        share = tl.where(row < asking, 1.0 / tl.sum(weight, 1), 0.0)
        total += weight * share[:, None]
    number = tl.sum(one.to(tl.float32))
    found = tl.where(one, tl.sum(total, 0), 0.0) * (number / (asking * GROUP).to(tl.float32))
    tl.store(out + at, found, mask=place < asking)


@triton.jit
def sums_of_weights(
    queries,  # [batch, heads * GROUP, asking, SIZE], those of the last column and every `distance` before it
    query_batch,
    query_head,
    query_row,
    keys,  # [batch, heads, count, SIZE]
    key_batch,
    key_head,
    key_row,
    out,  # float32 [batch * heads * GROUP, asking]: log2 of the sum of a query's weights
    heads,
    asking,
    count,
    distance,
    scale,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,  # keys at a time
    SIZE_SPAN: tl.constexpr,
):
    """Some queries of one head over all keys up to each, by the online softmax of FlashAttention-2 (arXiv 2307.08691)."""
    head = tl.cast(tl.program_id(1), tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    asks = of_head(queries, query_batch, query_head, heads, head, GROUP)
    query = rows_of(asks, row, query_row, row < asking, SIZE, SIZE_SPAN, WIDE)
    own = of_head(keys, key_batch, key_head, heads, head // GROUP, 1)
    top, total = tl.full([ROWS], HIDDEN, dtype=tl.float32), tl.zeros([ROWS], dtype=tl.float32)
    of = count - 1 - (asking - 1 - row) * distance  # the column of a query
    end = tl.minimum(count - (asking - (tl.program_id(0) + 1) * ROWS) * distance, count)
    for begin in range(0, end, KEYS):
        column = begin + tl.arange(0, KEYS)
        key = columns_of(own, column, key_row, column < count, SIZE, SIZE_SPAN, WIDE)
        seen = column[None, :] <= of[:, None]
        score = tl.where(seen, tl.dot(query, key) * scale, HIDDEN)
        higher = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(score - higher[:, None]), 1)
        top = higher
    tl.store(out + head * asking + row, top + tl.log2(total), mask=row < asking)


@triton.jit
def received_by_keys(
    queries,  # as above
    query_batch,
    query_head,
    query_row,
    keys,
    key_batch,
    key_head,
    key_row,
    sums,  # what `sums_of_weights` found
    out,  # float32 [batch * heads, count]
    heads,
    asking,
    count,
    distance,
    scale,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE_SPAN: tl.constexpr,
):
    """Some keys of one KV head: the attention of all queries that see them, summed, mean over the group."""
    head = tl.cast(tl.program_id(1), tl.int64)
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    own = of_head(keys, key_batch, key_head, heads, head, 1)
    key = columns_of(own, column, key_row, column < count, SIZE, SIZE_SPAN, WIDE)
    total = tl.zeros([ROWS, KEYS], dtype=tl.float32)
    # Queries before the first of these keys see none of them.
    first = tl.maximum(asking - 1 - (count - 1 - tl.program_id(0) * KEYS) // distance, 0) // ROWS
    for step in range(first * GROUP, tl.cdiv(asking, ROWS) * GROUP):
        row = step // GROUP * ROWS + tl.arange(0, ROWS)
        asks = of_head(queries, query_batch, query_head, heads, head * GROUP + step % GROUP, GROUP)
        query = rows_of(asks, row, query_row, row < asking, SIZE, SIZE_SPAN, WIDE)
        of = (head * GROUP + step % GROUP) * asking + row
        whole = tl.load(sums + of, mask=row < asking, other=0.0)
        seen = (column[None, :] <= count - 1 - (asking - 1 - row[:, None]) * distance) & (row < asking)[:, None]
        total += tl.where(seen, tl.exp2(tl.dot(query, key) * scale - whole[:, None]), 0.0)
    tl.store(out + head * count + column, tl.sum(total, 0) / GROUP, mask=column < count)
