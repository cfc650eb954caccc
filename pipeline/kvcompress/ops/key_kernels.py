"""Triton kernels of the scores that look at keys or queries one by one, where each step would write and read all anew.

Keys are laid out as `attention_kernels` says, all else is contiguous. Importing this file needs triton; `launches` calls the
kernels.
"""

import triton
import triton.language as tl

from kvcompress.ops.attention_sum_kernels import of_head, rows_of

PRECISE = tl.constexpr("tf32x3")  # three products of tensor cores, next to float32's own precision


@triton.jit
def gaussian_logits(
    keys,  # [batch, heads, count, SIZE], bfloat16
    key_batch,
    key_head,
    key_row,
    mean,  # float32 [batch * heads, GROUP, SIZE]
    spread,  # [batch * heads, GROUP, SIZE, SIZE], as keys
    out,  # float32 [batch * heads, GROUP, count]
    heads,
    count,
    scaling,
    GROUP: tl.constexpr,  # query heads a KV head
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: triton's interpreter knows no product of bfloat16
    ROWS: tl.constexpr,  # keys a program
    SIZE_SPAN: tl.constexpr,  # a power of two that reaches over the head
):
    """s k.m + s^2 k'Ck / 2 of every key k, for each query head of the group; s is `scaling`."""
    head = tl.cast(tl.program_id(1), tl.int64)
    row, element = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE_SPAN)
    own = of_head(keys, key_batch, key_head, heads, head, 1)
    key = rows_of(own, row, key_row, row < count, SIZE, SIZE_SPAN, WIDE)
    exact = key.to(tl.float32)
    for query in range(GROUP):
        of = head * GROUP + query
        middle = tl.load(mean + of * SIZE + element, mask=element < SIZE, other=0.0)
        matrix = rows_of(spread, of * SIZE + element, SIZE, element < SIZE, SIZE, SIZE_SPAN, WIDE)
        moved = tl.dot(key, matrix) * (scaling * scaling / 2) + middle[None, :] * scaling
        tl.store(out + of * count + row, tl.sum(moved * exact, 1), mask=row < count)


@triton.jit
def turned_back(
    keys,  # [batch, heads, count, SIZE], rotated, the key of column c for position c
    key_batch,
    key_head,
    key_row,
    there,  # bool [batch * heads, count]
    cosines,  # float32 [count, HALF], of the angle by which a column's planes were turned
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
    REST_SPAN: tl.constexpr,  # of dimensions that do not turn, 0 where there are none
    SKETCH_SPAN: tl.constexpr,
):
    """Keys as they were before rotation, projected; 0 where they are not there."""
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
    """Vectors whose planes are turned by the angles of their rows."""
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
    """|(x - middle) matrix| ** 2 of every vector x."""
    head = tl.cast(tl.program_id(1), tl.int64)
    row, element = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE_SPAN)
    vector = rows_of(vectors, head * count + row, SIZE, row < count, SIZE, SIZE_SPAN, False)
    vector -= tl.load(middle + head * SIZE + element, mask=element < SIZE, other=0.0)[None, :]
    onto = rows_of(matrix, head * SIZE + element, SIZE, element < SIZE, SIZE, SIZE_SPAN, False)
    moved = tl.dot(vector, onto, input_precision=PRECISE)
    tl.store(out + head * count + row, tl.sum(moved * moved, 1), mask=row < count)
