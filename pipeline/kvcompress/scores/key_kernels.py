"""Triton kernels of the scores that look at keys alone, whose steps would each write and read all keys anew.

All tensors are contiguous. Importing this file needs triton; `launches` calls the kernels.
"""

import triton
import triton.language as tl

from kvcompress.scores.attention_kernels import rows_of

PRECISE = tl.constexpr("tf32x3")  # three products of tensor cores, next to float32's own precision


@triton.jit
def gaussian_logits(
    keys,  # [batch * HEADS, count, SIZE], bfloat16
    mean,  # float32 [batch * HEADS, GROUP, SIZE]
    spread,  # [batch * HEADS, GROUP, SIZE, SIZE], as keys
    out,  # float32 [batch * HEADS, GROUP, count]
    count,
    GROUP: tl.constexpr,  # query heads a KV head
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: triton's interpreter knows no product of bfloat16
    ROWS: tl.constexpr,  # keys a program
    SIZE_SPAN: tl.constexpr,  # a power of two that reaches over the head
):
    """k.m + k'Ck of every key k, for each query head of the group."""
    head = tl.cast(tl.program_id(1), tl.int64)
    row, element = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE_SPAN)
    key = rows_of(keys, head * count + row, row < count, SIZE, SIZE_SPAN, WIDE)
    exact = key.to(tl.float32)
    for query in range(GROUP):
        of = head * GROUP + query
        middle = tl.load(mean + of * SIZE + element, mask=element < SIZE, other=0.0)
        matrix = rows_of(spread, of * SIZE + element, element < SIZE, SIZE, SIZE_SPAN, WIDE)
        moved = tl.dot(key, matrix) + middle[None, :]
        tl.store(out + of * count + row, tl.sum(moved * exact, 1), mask=row < count)


@triton.jit
def turned_back(
    keys,  # [batch * HEADS, count, SIZE], rotated, the key of column c for position c
    there,  # bool [batch * HEADS, count]
    cosines,  # float32 [count, HALF], of the angle by which a column's planes were turned
    sines,
    projection,  # float32 [SIZE, SKETCH]
    out,  # float32 [batch * HEADS, count, SKETCH]
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
    at = keys + (head * count + row[:, None]) * SIZE + plane[None, :]
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
        at = keys + (head * count + row[:, None]) * SIZE + element[None, :]
        rest = tl.load(at, mask=one[:, None] & left[None, :], other=0.0).to(tl.float32)
        onto = projection + element[:, None] * SKETCH + to[None, :]
        known = left[:, None] & wanted[None, :]
        found += tl.dot(rest, tl.load(onto, mask=known, other=0.0), input_precision=PRECISE)
    place = out + (head * count + row[:, None]) * SKETCH + to[None, :]
    tl.store(place, found, mask=(row < count)[:, None] & wanted[None, :])


@triton.jit
def squared_lengths(
    vectors,  # float32 [batch * HEADS, count, SIZE]
    middle,  # float32 [batch * HEADS, SIZE]
    matrix,  # float32 [batch * HEADS, SIZE, SIZE]
    out,  # float32 [batch * HEADS, count]
    count,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE_SPAN: tl.constexpr,
):
    """|(x - middle) matrix| ** 2 of every vector x."""
    head = tl.cast(tl.program_id(1), tl.int64)
    row, element = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE_SPAN)
    vector = rows_of(vectors, head * count + row, row < count, SIZE, SIZE_SPAN, False)
    vector -= tl.load(middle + head * SIZE + element, mask=element < SIZE, other=0.0)[None, :]
    onto = rows_of(matrix, head * SIZE + element, element < SIZE, SIZE, SIZE_SPAN, False)
    moved = tl.dot(vector, onto, input_precision=PRECISE)
    tl.store(out + head * count + row, tl.sum(moved * moved, 1), mask=row < count)
