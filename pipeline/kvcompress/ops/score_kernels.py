"""Triton kernels of key scores, in half precision, for a text whose keys are all there, column by column.

The first three sum up attention: weights exist inside a program only and are never stored. The others transform keys or
queries one by one, where torch's separate operations would each write and read all of them.

Vectors `[batch, head, row, SIZE]` come with the number of elements between two batches, heads and rows; the elements
of a vector are contiguous, and so is every other tensor. Products are summed in float32. Weights are powers of 2: the
`scale` of attention contains log2(e). Importing this file needs triton; `score_launchers` calls the kernels.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-3.4e38)  # finite: where all keys are hidden, weights must not become NaN
PRECISE = tl.constexpr("tf32x3")  # three products of tensor cores, close to float32's own precision


@triton.jit
def of_head(vectors, to_batch, to_head, number, head, BY: tl.constexpr):
    """Address of head `head` of `[batch, number * BY, ...]`, heads counted through all batches."""
    head = tl.cast(head, tl.int64)
    return vectors + head // (number * BY) * to_batch + head % (number * BY) * to_head


@triton.jit
def rows_of(vectors, row, to_row, inside, SIZE: tl.constexpr, SIZE_SPAN: tl.constexpr, WIDE: tl.constexpr):
    """Load vectors `row` of one head, `[row, SIZE_SPAN]`, 0 where they are not inside."""
    element = tl.arange(0, SIZE_SPAN)
    at = vectors + tl.cast(row, tl.int64)[:, None] * to_row + element[None, :]
    found = tl.load(at, mask=inside[:, None] & (element[None, :] < SIZE), other=0.0)
    return found.to(tl.float32) if WIDE else found


@triton.jit
def columns_of(vectors, column, to_row, inside, SIZE: tl.constexpr, SIZE_SPAN: tl.constexpr, WIDE: tl.constexpr):
    """Load vectors `column` of one head transposed, `[SIZE_SPAN, column]`, 0 where they are not inside."""
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
    WIDE: tl.constexpr,  # multiply in float32: triton's interpreter has no product of bfloat16
    ROWS: tl.constexpr,  # queries at a time
    CHUNK_SPAN: tl.constexpr,  # powers of two that cover the chunk ...
    SIZE_SPAN: tl.constexpr,  # ... and the head
):
    """Sum the attention of one chunk's queries to the chunk's keys, without a causal mask, for one KV head."""
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
    queries,  # [batch, heads * GROUP, asking, SIZE], at the last column and every `distance` columns before it
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
    """Sum the causal weights of ROWS queries by the online softmax of FlashAttention-2 (arXiv 2307.08691)."""
    head = tl.cast(tl.program_id(1), tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    asks = of_head(queries, query_batch, query_head, heads, head, GROUP)
    query = rows_of(asks, row, query_row, row < asking, SIZE, SIZE_SPAN, WIDE)
    own = of_head(keys, key_batch, key_head, heads, head // GROUP, 1)
    top, total = tl.full([ROWS], HIDDEN, dtype=tl.float32), tl.zeros([ROWS], dtype=tl.float32)
    of = count - 1 - (asking - 1 - row) * distance  # column of each query
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
    queries,  # as in `sums_of_weights`
    query_batch,
    query_head,
    query_row,
    keys,
    key_batch,
    key_head,
    key_row,
    sums,  # the output of `sums_of_weights`
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
    """Sum the attention that KEYS keys of one KV head receive from all queries that see them, mean over the group."""
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


@triton.jit
def gaussian_logits(
    keys,  # [batch, heads, count, SIZE], bfloat16
    key_batch,
    key_head,
    key_row,
    mean,  # float32 [batch * heads, GROUP, SIZE]
    covariance,  # [batch * heads, GROUP, SIZE, SIZE], in the keys' precision
    out,  # float32 [batch * heads, GROUP, count]
    heads,
    count,
    scaling,
    GROUP: tl.constexpr,  # query heads a KV head
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: triton's interpreter has no product of bfloat16
    ROWS: tl.constexpr,  # keys a program
    SIZE_SPAN: tl.constexpr,  # a power of two that covers the head
):
    """Compute s k.m + s^2 k'Ck / 2 of every key k, for each query head of the group; s is `scaling`."""
    head = tl.cast(tl.program_id(1), tl.int64)
    row, element = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE_SPAN)
    own = of_head(keys, key_batch, key_head, heads, head, 1)
    key = rows_of(own, row, key_row, row < count, SIZE, SIZE_SPAN, WIDE)
    exact = key.to(tl.float32)
    for query in range(GROUP):
        of = head * GROUP + query
        middle = tl.load(mean + of * SIZE + element, mask=element < SIZE, other=0.0)
        matrix = rows_of(covariance, of * SIZE + element, SIZE, element < SIZE, SIZE, SIZE_SPAN, WIDE)
        moved = tl.dot(key, matrix) * (scaling * scaling / 2) + middle[None, :] * scaling
        tl.store(out + of * count + row, tl.sum(moved * exact, 1), mask=row < count)


@triton.jit
def turned_back(
    keys,  # [batch, heads, count, SIZE], rotated; the key of column c for position c
    key_batch,
    key_head,
    key_row,
    there,  # bool [batch * heads, count]
    cosines,  # float32 [count, HALF], of the angles by which a column's planes were turned
    sines,
    projection,  # float32 [SIZE, SKETCH]
    out,  # float32 [batch * heads, count, SKETCH]
    heads,
    count,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,  # planes that turn
    SKETCH: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_SPAN: tl.constexpr,
    REST_SPAN: tl.constexpr,  # covers the dimensions that do not turn, 0 without any
    SKETCH_SPAN: tl.constexpr,
):
    """Undo the rotation of keys and project them; 0 where a key is not there."""
    head = tl.cast(tl.program_id(1), tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    one = tl.load(there + head * count + row, mask=row < count, other=0).to(tl.int1)
    plane, to = tl.arange(0, HALF_SPAN), tl.arange(0, SKETCH_SPAN)
    turning, wanted = plane < HALF, to < SKETCH
    of = row[:, None] * HALF + plane[None, :]
    near = (row < count)[:, None] & turning[None, :]
    cos, sin = tl.load(cosines + of, mask=near, other=0.0), tl.load(sines + of, mask=near, other=0.0)
    own = of_head(keys, key_batch, key_head, heads, head, 1) + tl.cast(row, tl.int64)[:, None] * key_row
    at = own + plane[None, :]
    some = one[:, None] & turning[None, :]
    first = tl.load(at, mask=some, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=some, other=0.0).to(tl.float32)
    onto = projection + plane[:, None] * SKETCH + to[None, :]
    known = turning[:, None] & wanted[None, :]
    found = tl.dot(first * cos + second * sin, tl.load(onto, mask=known, other=0.0), input_precision=PRECISE)
    onto += HALF * SKETCH
    found += tl.dot(second * cos - first * sin, tl.load(onto, mask=known, other=0.0), input_precision=PRECISE)
    if REST_SPAN > 0:
        element = 2 * HALF + tl.arange(0, REST_SPAN)
        left = element < SIZE
        rest = tl.load(own + element[None, :], mask=one[:, None] & left[None, :], other=0.0).to(tl.float32)
        onto = projection + element[:, None] * SKETCH + to[None, :]
        known = left[:, None] & wanted[None, :]
        found += tl.dot(rest, tl.load(onto, mask=known, other=0.0), input_precision=PRECISE)
    place = out + (head * count + row[:, None]) * SKETCH + to[None, :]
    tl.store(place, found, mask=(row < count)[:, None] & wanted[None, :])


@triton.jit
def turned(
    vectors,  # [batch, heads, count, SIZE]
    to_batch,
    to_head,
    to_row,
    cosines,  # float32 [count, HALF]
    sines,
    out,  # float32 [batch * heads, count, SIZE]
    heads,
    count,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_SPAN: tl.constexpr,
    REST_SPAN: tl.constexpr,
):
    """Turn the planes of vectors by the angles of their rows."""
    head = tl.cast(tl.program_id(1), tl.int64)
    row, plane = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF_SPAN)
    inside = (row < count)[:, None] & (plane < HALF)[None, :]
    of = row[:, None] * HALF + plane[None, :]
    cos, sin = tl.load(cosines + of, mask=inside, other=0.0), tl.load(sines + of, mask=inside, other=0.0)
    own = of_head(vectors, to_batch, to_head, heads, head, 1) + tl.cast(row, tl.int64)[:, None] * to_row
    place = out + (head * count + row[:, None]) * SIZE
    first = tl.load(own + plane[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(own + HALF + plane[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(place + plane[None, :], first * cos - second * sin, mask=inside)
    tl.store(place + HALF + plane[None, :], second * cos + first * sin, mask=inside)
    if REST_SPAN > 0:
        element = 2 * HALF + tl.arange(0, REST_SPAN)
        left = (row < count)[:, None] & (element < SIZE)[None, :]
        rest = tl.load(own + element[None, :], mask=left, other=0.0).to(tl.float32)
        tl.store(place + element[None, :], rest, mask=left)


@triton.jit
def squared_lengths(
    vectors,  # float32 [batch * heads, count, SIZE]
    middle,  # float32 [batch * heads, SIZE]
    matrix,  # float32 [batch * heads, SIZE, SIZE]
    out,  # float32 [batch * heads, count]
    count,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE_SPAN: tl.constexpr,
):
    """Compute |(x - middle) matrix| ** 2 of every vector x."""
    head = tl.cast(tl.program_id(1), tl.int64)
    row, element = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE_SPAN)
    vector = rows_of(vectors, head * count + row, SIZE, row < count, SIZE, SIZE_SPAN, False)
    vector -= tl.load(middle + head * SIZE + element, mask=element < SIZE, other=0.0)[None, :]
    onto = rows_of(matrix, head * SIZE + element, SIZE, element < SIZE, SIZE, SIZE_SPAN, False)
    moved = tl.dot(vector, onto, input_precision=PRECISE)
    tl.store(out + head * count + row, tl.sum(moved * moved, 1), mask=row < count)
