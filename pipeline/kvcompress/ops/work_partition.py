"""The line of work that the decode kernel's programs divide among themselves.

The keys of a (row, KV head) pair are cut into units, and the units of all pairs lie one after the other on a line; each
program takes an equal piece of it (the idea of Stream-K, arXiv 2301.03598). A pair of few keys is never cut, because to
merge partial results takes longer than to read it: a boundary within one moves to its start.
"""

import triton
import triton.language as tl


@triton.jit
def boundary_of(
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
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Where a program's piece begins: the unit, the pair there, and that pair's first unit.

    `units`, `uncut` (1 or 0) and `unbounded` (1 or 0) are of `heads`; `row_units` and `row_skips`, the units that an
    unbounded head's padding takes away, of `rows`, and read only if PADDED.
    """
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
    """Which program has a unit of a pair that may be cut."""
    share, longer = all_units // tl.num_programs(0), all_units % tl.num_programs(0)
    in_longer = unit // (share + 1)
    return tl.where(in_longer < longer, in_longer, longer + (unit - longer * (share + 1)) // tl.maximum(share, 1))
