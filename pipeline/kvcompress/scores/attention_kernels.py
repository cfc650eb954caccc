"""Triton kernels of the scores that sum up attention: weights are made inside a program and never stored.

They serve half precision, whose products a GPU multiplies as they are and adds up in float32, on a text whose keys and
queries are all there, column by column. All tensors are contiguous; weights are powers of 2, so `scale`, which multiplies
products of queries and keys, has log2(e) in it. Importing this file needs triton; `launches` calls the kernels.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-3.4e38)  # finite: where all keys are hidden, weights must not become NaN


@triton.jit
def rows_of(vectors, row, inside, SIZE: tl.constexpr, SIZE_SPAN: tl.constexpr, WIDE: tl.constexpr):
    """Vectors number `row`, `[row, SIZE_SPAN]`, 0 where they are not inside."""
    element = tl.arange(0, SIZE_SPAN)
    at = vectors + row[:, None] * SIZE + element[None, :]
    found = tl.load(at, mask=inside[:, None] & (element[None, :] < SIZE), other=0.0)
    return found.to(tl.float32) if WIDE else found


@triton.jit
def columns_of(vectors, column, inside, SIZE: tl.constexpr, SIZE_SPAN: tl.constexpr, WIDE: tl.constexpr):
    """The same transposed, `[SIZE_SPAN, column]`."""
    element = tl.arange(0, SIZE_SPAN)
    at = vectors + column[None, :] * SIZE + element[:, None]
    found = tl.load(at, mask=inside[None, :] & (element[:, None] < SIZE), other=0.0)
    return found.to(tl.float32) if WIDE else found


@triton.jit
def among_neighbours(
    queries,  # [batch * HEADS * GROUP, count, SIZE]
    keys,  # [batch * HEADS, count, SIZE]
    there,  # bool [batch * HEADS, count]
    out,  # float32 [batch * HEADS, count]
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
    key = columns_of(keys, at, place < asking, SIZE, SIZE_SPAN, WIDE)
    total = tl.zeros([ROWS, CHUNK_SPAN], dtype=tl.float32)
    for step in range(0, GROUP * tl.cdiv(asking, ROWS)):
        row = step // GROUP * ROWS + tl.arange(0, ROWS)
        of = (head * GROUP + step % GROUP) * count + first + row
        query = rows_of(queries, of, row < asking, SIZE, SIZE_SPAN, WIDE)
        score = tl.where(one[None, :], tl.dot(query, key) * scale, HIDDEN)
        weight = tl.exp2(score - tl.max(score, 1)[:, None])
        share = tl.where(row < asking, 1.0 / tl.sum(weight, 1), 0.0)
        total += weight * share[:, None]
    number = tl.sum(one.to(tl.float32))
    found = tl.where(one, tl.sum(total, 0), 0.0) * (number / (asking * GROUP).to(tl.float32))
    tl.store(out + at, found, mask=place < asking)


@triton.jit
def sums_of_weights(
    queries,  # [batch * HEADS * GROUP, asking, SIZE], those of the last column and every `distance` before it
    keys,  # [batch * HEADS, count, SIZE]
    out,  # float32 [batch * HEADS * GROUP, asking]: log2 of the sum of a query's weights
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
    query = rows_of(queries, head * asking + row, row < asking, SIZE, SIZE_SPAN, WIDE)
    top, total = tl.full([ROWS], HIDDEN, dtype=tl.float32), tl.zeros([ROWS], dtype=tl.float32)
    of = count - 1 - (asking - 1 - row) * distance  # the column of a query
    end = tl.minimum(count - (asking - (tl.program_id(0) + 1) * ROWS) * distance, count)
    for begin in range(0, end, KEYS):
        column = begin + tl.arange(0, KEYS)
        key = columns_of(keys, head // GROUP * count + column, column < count, SIZE, SIZE_SPAN, WIDE)
        seen = column[None, :] <= of[:, None]
        score = tl.where(seen, tl.dot(query, key) * scale, HIDDEN)
        higher = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(score - higher[:, None]), 1)
        top = higher
    tl.store(out + head * asking + row, top + tl.log2(total), mask=row < asking)


@triton.jit
def received_by_keys(
    queries,  # as above
    keys,
    sums,  # what `sums_of_weights` found
    out,  # float32 [batch * HEADS, count]
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
    key = columns_of(keys, head * count + column, column < count, SIZE, SIZE_SPAN, WIDE)
    total = tl.zeros([ROWS, KEYS], dtype=tl.float32)
    # Queries before the first of these keys see none of them.
    first = tl.maximum(asking - 1 - (count - 1 - tl.program_id(0) * KEYS) // distance, 0) // ROWS
    for step in range(first * GROUP, tl.cdiv(asking, ROWS) * GROUP):
        row = step // GROUP * ROWS + tl.arange(0, ROWS)
        of = (head * GROUP + step % GROUP) * asking + row
        query = rows_of(queries, of, row < asking, SIZE, SIZE_SPAN, WIDE)
        whole = tl.load(sums + of, mask=row < asking, other=0.0)
        seen = (column[None, :] <= count - 1 - (asking - 1 - row[:, None]) * distance) & (row < asking)[:, None]
        total += tl.where(seen, tl.exp2(tl.dot(query, key) * scale - whole[:, None]), 0.0)
    tl.store(out + head * count + column, tl.sum(total, 0) / GROUP, mask=column < count)
