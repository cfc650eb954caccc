"""Keep the keys of smallest norm (Devoto et al. 2024, arXiv 2406.11430).

A layer that holds more than `prune_after` tokens after a forward pass keeps `ceil(keep_ratio * n)` of its n keys per
head, those with the smallest L2 norm after rotation, in time order. The first two layers are skipped, as in the paper.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.methods.compressor import require_count, require_share
from kvcompress.methods.evicting import SelectingCompressor


@dataclass(frozen=True)
class SmallestNorms:
    """Keys `[batch, kv_head, slot, head_dim]` -> slots that stay `[batch, kv_head, kept]`; None below the threshold."""

    keep_ratio: float
    prune_after: int

    def __call__(self, keys: Tensor) -> Tensor | None:
        held = keys.shape[2]
        kept = math.ceil(self.keep_ratio * held - 1e-9)  # 0.07 * 100 is a hair above 7 in binary
        if held <= self.prune_after or kept >= held:
            return None
        return keys.float().norm(dim=-1).topk(kept, largest=False).indices.sort().values


class L2Compressor(SelectingCompressor):
    """`l2_compress` behind the common interface. Raises `InputError` for a ratio outside [0, 1]."""

    def __init__(self, keep_ratio: float = 1.0, prune_after: int = 1000, skip_layers: Iterable[int] = (0, 1)) -> None:
        rule = SmallestNorms(require_share("keep_ratio", keep_ratio), require_count("prune_after", prune_after, 0))
        super().__init__(rule, skip_layers)


def l2_compress(
    past_key_values: Cache, keep_ratio: float = 1.0, prune_after: int = 1000, skip_layers: Iterable[int] = (0, 1)
) -> RaggedCache:
    """Compress a cache in one call."""
    return L2Compressor(keep_ratio, prune_after, skip_layers).compress(past_key_values)
