"""Inputs of a score: the keys of a layer with their positions in the text, and queries.

The inputs serve two occasions. At the end of an exact prefill, keys and queries are those of the whole prompt. While
streaming and decoding, the keys are those that each head holds, with gaps between their positions, and the queries are
those of the last chunk. Keys and queries are given after rotation, as the cache and the attention function have them.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvcompress.core.errors import InputError
from kvcompress.models.rotary import Rotation


@dataclass(frozen=True)
class AttentionTotals:
    """Attention that keys have received so far, carried from chunk to chunk of a stream.

    What a key received does not depend on later queries, so a stream keeps two numbers a key. A cache that evicts keys
    takes the remaining slots of both. New keys begin with 0.

    Parameters
    ----------
    total: attention summed over queries, mean over the query heads of a KV head, float32 `[batch, kv_head, key]`.
    queries: number of queries that could see the key, float32 of the same shape.
    """

    total: Tensor
    queries: Tensor

    def __add__(self, other: "AttentionTotals") -> "AttentionTotals":
        return AttentionTotals(self.total + other.total, self.queries + other.queries)

    def take(self, slots: Tensor) -> "AttentionTotals":
        """Totals of the keys in `slots`, int64 `[batch, kv_head, kept]`."""
        return AttentionTotals(self.total.gather(2, slots), self.queries.gather(2, slots))


@dataclass(frozen=True)
class ScoreInputs:
    """Tensors of one layer, or of those of its KV heads that hold equally many keys.

    Raises `InputError` if the shapes do not fit together.

    Parameters
    ----------
    keys: `[batch, kv_head, key, head_dim]`, in any order.
    values: `[batch, kv_head, key, value_dim]`.
    positions: position of each key in the text, integers `[batch or 1, kv_head or 1, key]`; -1 is an empty slot or a
        pad.
    scaling: multiplies the products of queries and keys, usually head_dim ** -0.5.
    queries: `[batch, query_head, query, head_dim]`, query heads of one KV head next to each other [default: none].
    query_positions: integers `[batch or 1, query]`, ascending; negative at pads, which are ignored.
    rotation: the model's rotary embedding, None if unknown.
    stays: bool `[batch or 1, kv_head or 1, key]`, keys that are kept whatever they score (sinks, window). Scores that
        compare keys with each other leave them out if their paper does.
    earlier: totals of all keys before these queries [default: unknown].
    in_order: these are all keys of a text without pads, column by column; if there are as many queries, so are they.
        Positions then need not be read, which would wait for all work of an accelerator.
    query_range: positions of the queries as a Python range if they are known to be the same in every row, else None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scaling: float
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    rotation: Rotation | None = None
    stays: Tensor | None = None
    earlier: AttentionTotals | None = None
    in_order: bool = False
    query_range: range | None = None

    def __post_init__(self) -> None:
        batch, heads, count = self.keys.shape[:3]
        require_shape("values", self.values.shape[:3], ((batch,), (heads,), (count,)))
        for name in ("positions", "stays"):
            tensor = getattr(self, name)
            if tensor is not None:
                require_shape(name, tensor.shape, ((batch, 1), (heads, 1), (count,)))
        if self.queries is None:
            return
        if self.query_positions is None or self.queries.shape[1] % heads:
            raise InputError(
                f"queries {list(self.queries.shape)} need query_positions and a multiple of {heads} (KV) heads"
            )
        require_shape("query_positions", self.query_positions.shape, ((batch, 1), (self.queries.shape[2],)))

    @cached_property
    def real(self) -> Tensor:
        """Slots that hold a key, bool `[batch, kv_head, key]`."""
        return (self.positions >= 0).expand(self.keys.shape[:3])

    @cached_property
    def candidates(self) -> Tensor:
        """Keys to select from, bool `[batch, kv_head, key]`."""
        if self.in_order and self.stays is not None:
            return ~self.stays.expand(self.keys.shape[:3])
        return self.real if self.stays is None else self.real & ~self.stays

    @cached_property
    def others(self) -> Tensor:
        """Complement of `candidates`."""
        if self.in_order and self.stays is not None:
            return self.stays.expand(self.keys.shape[:3])
        return ~self.candidates

    @property
    def whole(self) -> bool:
        """True if these are all keys and all queries of a text, column by column."""
        return self.in_order and self.queries is not None and self.queries.shape[2] == self.keys.shape[2]

    def between(self, start: int, stop: int) -> "ScoreInputs":
        """Tokens `start` to `stop` of a text that is here as a `whole`."""
        assert self.queries is not None
        return replace(
            self,
            keys=self.keys[:, :, start:stop],
            values=self.values[:, :, start:stop],
            positions=self.positions[..., start:stop],
            queries=self.queries[:, :, start:stop],
            query_positions=self.at[:, start:stop],
            stays=None if self.stays is None else self.stays[..., start:stop],
            query_range=None if self.query_range is None else self.query_range[start:stop],
        )

    @property
    def grouped_queries(self) -> Tensor:
        """Queries by KV head, float32 `[batch, kv_head, group, query, head_dim]`."""
        assert self.queries is not None
        return self.queries.float().unflatten(1, (self.keys.shape[1], -1))

    @property
    def at(self) -> Tensor:
        """Positions of the queries, which must be there, `[batch or 1, query]`."""
        assert self.query_positions is not None
        return self.query_positions


def require_shape(name: str, shape: torch.Size, allowed: tuple[tuple[int, ...], ...]) -> None:
    """Raise `InputError` unless every size of `shape` is among those allowed for its dimension."""
    if len(shape) != len(allowed) or any(size not in sizes for size, sizes in zip(shape, allowed, strict=True)):
        expected = ", ".join(" or ".join(map(str, dict.fromkeys(sizes))) for sizes in allowed)
        raise InputError(f"{name} is of shape {list(shape)}, expected [{expected}]")
