"""What goes into a choice of keys and what comes out of it, for one group of heads or for several that are alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress.cache.padding import Padding
from kvcompress.models.rotary import Rotation
from kvcompress.scores.inputs import AttentionTotals


@dataclass(frozen=True)
class Evidence:
    """What scores know besides keys: the queries `[batch, kv_head, group, query, head_dim]` of the columns just before
    the choice (None for scores that need none), what multiplies products of queries and keys, padding and rotation."""

    queries: Tensor | None
    scaling: float
    padding: Padding
    rotation: Rotation | None

    def of(self, heads: slice | Tensor) -> "Evidence":
        """The same for some of the KV heads."""
        return self if self.queries is None else replace(self, queries=self.queries[:, heads])


@dataclass(frozen=True)
class Known:
    """Of every slot, as of a choice: where its key stands, int32 `[batch, head, slot]`, and what that key received by then
    (None for scores that do not accumulate)."""

    places: Tensor
    earlier: AttentionTotals | None

    def rows(self, rows: Tensor) -> "Known":
        """The same of these rows of the batch."""
        places, *sums = (tensor.index_select(0, rows) for tensor in self.tensors)
        return Known(places, AttentionTotals(*sums) if sums else None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.places,) if self.earlier is None else (self.places, self.earlier.total, self.earlier.queries)


@dataclass(frozen=True)
class Exchange:
    """What a choice comes to: the slots `into` shall hold what the slots `source` hold now, `[batch, head, slot]` each;
    `after` is what is known then."""

    source: Tensor
    into: Tensor
    after: Known

    def split(self, heads: Sequence[int]) -> Iterator["Exchange"]:
        """The same, cut into so many heads each, with memory of its own for what will be kept."""
        if len(heads) == 1:
            yield self
            return
        earlier, begin = self.after.earlier, 0
        for count in heads:
            part = slice(begin, begin + count)
            received = earlier and AttentionTotals(earlier.total[:, part].clone(), earlier.queries[:, part].clone())
            known = Known(self.after.places[:, part].clone(), received)
            yield Exchange(self.source[:, part], self.into[:, part], known)
            begin += count


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Heads side by side."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), 1)


def join_known(parts: Sequence[Known | None]) -> Known | None:
    """The same of what is known, of all of them or of none."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    earlier = [part.earlier for part in known if part.earlier is not None]
    received = (
        AttentionTotals(join([of.total for of in earlier]), join([of.queries for of in earlier])) if earlier else None
    )
    return Known(join([part.places for part in known]), received)
