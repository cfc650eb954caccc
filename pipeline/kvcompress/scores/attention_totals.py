"""How much attention keys have received so far, carried from chunk to chunk of a stream.

What a key received does not depend on later queries, so a stream needs to keep two numbers a key. Whoever forgets keys
takes the same slots of both; new keys begin with nothing.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Received:
    """total: attention summed over queries, mean over the query heads of a KV head, float32 `[batch, kv_head, key]`.

    queries: how many queries could see the key, float32 of the same shape.
    """

    total: Tensor
    queries: Tensor

    def __add__(self, other: "Received") -> "Received":
        return Received(self.total + other.total, self.queries + other.queries)

    def take(self, slots: Tensor) -> "Received":
        """The same of the keys in these slots, `[batch, kv_head, kept]`."""
        return Received(self.total.gather(2, slots), self.queries.gather(2, slots))
