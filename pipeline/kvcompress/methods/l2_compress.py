"""Keys of smallest norm (Devoto et al. 2024, arXiv 2406.11430)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.methods.compressor import EvictingCompressor, require_count, require_share


@dataclass(frozen=True)
class SmallestNorms:
    """Keep rule: the `ceil(keep_ratio * n)` smallest of n norms; None up to `prune_after` keys."""

    keep_ratio: float
    prune_after: int

    def __call__(self, keys: Tensor) -> Tensor | None:
        held = keys.shape[2]
        kept = math.ceil(self.keep_ratio * held - 1e-9)  # 0.07 * 100 is slightly above 7 in binary
        if held <= self.prune_after or kept >= held:
            return None
        return keys.float().norm(dim=-1).topk(kept, largest=False).indices.sort().values


class L2Compressor(EvictingCompressor):
    """Keep the share `keep_ratio` of each head's keys with the smallest L2 norm after rotation, in time order.

    Layers with at most `prune_after` tokens after a forward pass keep all. The first two layers are skipped by default,
    as in the paper. Raises `InputError` for a ratio outside [0, 1].
    """

    def __init__(self, keep_ratio: float = 1.0, prune_after: int = 1000, skip_layers: Iterable[int] = (0, 1)) -> None:
        rule = SmallestNorms(require_share("keep_ratio", keep_ratio), require_count("prune_after", prune_after, 0))
        super().__init__(rule, skip_layers)


def l2_compress(
    past_key_values: Cache, keep_ratio: float = 1.0, prune_after: int = 1000, skip_layers: Iterable[int] = (0, 1)
) -> RaggedCache:
    """Compress a cache in one call."""
    return L2Compressor(keep_ratio, prune_after, skip_layers).compress(past_key_values)
