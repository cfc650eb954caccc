"""Launches of the score kernels, which replace torch's operations where `can_launch` allows it.

Both give the same result up to the order of sums.
"""

from contextlib import AbstractContextManager, nullcontext
from math import e, log2
from typing import Any

import torch
from torch import Tensor

from kvcompress.models.rotary import Rotation
from kvcompress.ops.ragged_decode import kernel, power_from, processors

LARGEST_SIZE = 256  # head size
LARGEST_CHUNK = 256  # keys that one program can hold
LEAST = 16  # fewest rows and columns of a matrix product


def can_launch(*tensors: Tensor) -> bool:
    """True if the kernels serve tensors `[.., head_dim]`: half precision on a GPU of compute capability 8 or more."""
    device, dtype = tensors[0].device, tensors[0].dtype
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and all(tensor.dtype == dtype and tensor.shape[-1] <= LARGEST_SIZE for tensor in tensors)
        and processors(device) > 0
        and kernel() is not None
    )


def among_neighbours(queries: Tensor, keys: Tensor, there: Tensor, chunk: int, scale: float) -> Tensor:
    """Sum non-causal attention inside chunks of a text, in multiples of its mean over the chunk's keys.

    queries `[batch, query_head, token, head_dim]`, keys `[batch, kv_head, token, head_dim]`, there bool `[batch,
    kv_head, token]` -> float32 like `there`. `chunk` is at most LARGEST_CHUNK.
    """
    from kvcompress.ops import score_kernels

    batch, heads, count, size = keys.shape
    out = torch.empty(batch, heads, count, dtype=torch.float32, device=keys.device)
    with on(keys.device):
        score_kernels.among_neighbours[(-(-count // chunk), batch * heads)](
            *laid_out(queries),
            *laid_out(keys),
            there.contiguous(),
            out,
            heads,
            count,
            scale * log2(e),
            GROUP=queries.shape[1] // heads,
            SIZE=size,
            CHUNK=chunk,
            WIDE=keys.device.type == "cpu",
            ROWS=64,
            CHUNK_SPAN=power(chunk),
            SIZE_SPAN=power(size),
            num_warps=4,
        )
    return out


def received_by_keys(queries: Tensor, keys: Tensor, scale: float, step: int = 1) -> Tensor:
    """Sum the causal attention that the keys of a text receive, mean over a KV head's query heads.

    queries `[batch, query_head, query, head_dim]`, of the last token and of the tokens `step`, 2 `step`, ... before
    it; keys `[batch, kv_head, token, head_dim]` -> float32 `[batch, kv_head, token]`.
    """
    from kvcompress.ops import score_kernels

    batch, heads, count, size = keys.shape
    query_heads, asking = queries.shape[1:3]
    group, rows, columns = query_heads // heads, 64, 64
    sums = torch.empty(batch, query_heads, asking, dtype=torch.float32, device=keys.device)
    out = torch.empty(batch, heads, count, dtype=torch.float32, device=keys.device)
    vectors = *laid_out(queries), *laid_out(keys)
    sizes = {"GROUP": group, "SIZE": size, "WIDE": keys.device.type == "cpu", "SIZE_SPAN": power(size)}
    sizes |= {"ROWS": rows, "KEYS": columns}
    numbers = heads, asking, count, step, scale * log2(e)
    with on(keys.device):
        score_kernels.sums_of_weights[(-(-asking // rows), batch * query_heads)](
            *vectors, sums, *numbers, **sizes, num_warps=4
        )
        score_kernels.received_by_keys[(-(-count // columns), batch * heads)](
            *vectors, sums, out, *numbers, **sizes, num_warps=4
        )
    return out


def gaussian_logits(keys: Tensor, mean: Tensor, covariance: Tensor, scaling: float) -> Tensor:
    """Compute s k.m + s^2 k'Ck / 2 of every key k for Gaussian queries of mean m and covariance C; s is `scaling`.

    keys `[batch, kv_head, key, head_dim]`, mean `[batch, kv_head, group, head_dim]`, covariance `[.., head_dim,
    head_dim]` -> float32 `[batch, kv_head, group, key]`.
    """
    from kvcompress.ops import score_kernels

    batch, heads, count, size = keys.shape
    group, rows = mean.shape[2], 64
    out = torch.empty(batch, heads, group, count, dtype=torch.float32, device=keys.device)
    with on(keys.device):
        score_kernels.gaussian_logits[(-(-count // rows), batch * heads)](
            *laid_out(keys),
            mean.float().contiguous(),
            covariance.to(keys.dtype).contiguous(),
            out,
            heads,
            count,
            scaling,
            GROUP=group,
            SIZE=size,
            WIDE=keys.device.type == "cpu",
            ROWS=rows,
            SIZE_SPAN=power(size),
            num_warps=4,
        )
    return out


def turned_back(keys: Tensor, there: Tensor, rotation: Rotation, projection: Tensor) -> Tensor:
    """Undo the rotation of a text's keys `[batch, kv_head, token, head_dim]` and project them by `[head_dim, sketch]`.

    Returns float32 `[batch, kv_head, token, sketch]`, 0 where `there`, bool `[batch, kv_head, token]`, is false.
    """
    from kvcompress.ops import score_kernels

    batch, heads, count, size = keys.shape
    sketch, half, rest, rows = projection.shape[1], rotation.dim // 2, size - rotation.dim, 128
    cos, sin = rotation.cos_sin(torch.arange(count, device=keys.device))
    out = torch.empty(batch, heads, count, sketch, dtype=torch.float32, device=keys.device)
    with on(keys.device):
        score_kernels.turned_back[(-(-count // rows), batch * heads)](
            *laid_out(keys),
            there.contiguous(),
            cos,
            sin,
            projection.contiguous(),
            out,
            heads,
            count,
            SIZE=size,
            HALF=half,
            SKETCH=sketch,
            ROWS=rows,
            HALF_SPAN=power(half),
            REST_SPAN=power(rest) if rest else 0,
            SKETCH_SPAN=power(sketch),
            num_warps=8,
        )
    return out


def turned(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn vectors `[batch, head, row, head_dim]` by angles of cos and sin `[row, plane]`, as float32."""
    from kvcompress.ops import score_kernels

    batch, heads, count, size = vectors.shape
    half, rows = cos.shape[1], 32
    rest = size - 2 * half
    out = torch.empty(vectors.shape, dtype=torch.float32, device=vectors.device)
    with on(vectors.device):
        score_kernels.turned[(-(-count // rows), batch * heads)](
            *laid_out(vectors),
            cos.contiguous(),
            sin.contiguous(),
            out,
            heads,
            count,
            SIZE=size,
            HALF=half,
            ROWS=rows,
            HALF_SPAN=power_from(half),
            REST_SPAN=power_from(rest) if rest else 0,
            num_warps=4,
        )
    return out


def squared_lengths(vectors: Tensor, middle: Tensor, matrix: Tensor) -> Tensor:
    """Compute |(x - middle) matrix| ** 2 of every vector x.

    vectors `[batch, kv_head, key, size]`, middle `[batch, kv_head, size]`, matrix `[batch, kv_head, size, size]`, all
    float32 -> `[batch, kv_head, key]`.
    """
    from kvcompress.ops import score_kernels

    batch, heads, count, size = vectors.shape
    rows = 128
    out = torch.empty(batch, heads, count, dtype=torch.float32, device=vectors.device)
    with on(vectors.device):
        score_kernels.squared_lengths[(-(-count // rows), batch * heads)](
            vectors.contiguous(),
            middle.contiguous(),
            matrix.contiguous(),
            out,
            count,
            SIZE=size,
            ROWS=rows,
            SIZE_SPAN=power(size),
            num_warps=4,
        )
    return out


def laid_out(vectors: Tensor) -> tuple[Tensor, int, int, int]:
    """Vectors `[batch, head, row, size]` and their strides of batch, head and row, with contiguous rows."""
    vectors = vectors if vectors.stride(-1) == 1 else vectors.contiguous()
    return vectors, vectors.stride(0), vectors.stride(1), vectors.stride(2)


def power(least: int) -> int:
    """Smallest power of two that is at least `least` and large enough for a matrix product."""
    return max(LEAST, power_from(least))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current CUDA device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
