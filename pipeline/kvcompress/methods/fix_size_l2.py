"""A cache of fixed size, filled by key norm: `l2_compress` with a budget in tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.cache.layer import CacheState, CompressedLayer
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.methods.compressor import EvictingCompressor, require_count, require_share
from kvcompress.models.architecture import Architecture

STRATEGIES = ("keep_low", "keep_high", "random")


@dataclass(frozen=True)
class FixedBudget:
    """Keep rule: `budget` keys, the last `recent` and older ones by `strategy`; None up to `budget` keys.

    Random draws come from one generator, seeded by `seed`: runs are reproducible and steps differ.
    """

    budget: int
    recent: int
    strategy: str
    seed: int
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    def __call__(self, keys: Tensor) -> Tensor | None:
        held = keys.shape[2]
        if held <= self.budget:
            return None
        older = held - self.recent
        if self.strategy == "random":
            scores = torch.rand(*keys.shape[:2], older, generator=self.generator).to(keys.device)
        else:
            scores = keys[:, :, :older].float().norm(dim=-1)
        kept = scores.topk(self.budget - self.recent, largest=self.strategy == "keep_high").indices.sort().values
        recent = torch.arange(older, held, device=keys.device).expand(*keys.shape[:2], self.recent)
        return torch.cat((kept, recent), dim=-1)


class FixSizeL2Compressor(EvictingCompressor):
    """Keep `fix_kv_size` keys in each head.

    The most recent `int(fix_kv_size * keep_ratio)` keys always stay; the rest are older keys of smallest ("keep_low") or
    largest ("keep_high") norm, or random ones ("random"). Raises `InputError` for an unknown strategy or a bad size, and
    `UnsupportedModelError` for "random" with a model split among processes.
    """

    def __init__(
        self,
        fix_kv_size: int = 1024,
        keep_ratio: float = 0.0,
        strategy: str = "keep_low",
        skip_layers: Iterable[int] = (0, 1),
        seed: int = 0,
    ) -> None:
        if strategy not in STRATEGIES:
            raise InputError(f"unknown strategy {strategy!r} for fix_size_l2, expected one of {', '.join(STRATEGIES)}")
        budget = require_count("fix_kv_size", fix_kv_size, 1)
        recent = int(budget * require_share("keep_ratio", keep_ratio))
        super().__init__(FixedBudget(budget, recent, strategy, seed), skip_layers)
        self.strategy = strategy

    def build_layers(self, architecture: Architecture, shared: CacheState) -> Sequence[CompressedLayer]:
        if self.strategy == "random" and shared.shard.count > 1:
            raise UnsupportedModelError(
                "fix_size_l2 with strategy 'random' does not serve a split model: it draws for all heads at once"
            )
        return super().build_layers(architecture, shared)


def fix_size_l2(
    past_key_values: Cache, fix_kv_size: int = 1024, keep_ratio: float = 0.0, **options: Any
) -> RaggedCache:
    """Compress a cache in one call; `options` are the others of `FixSizeL2Compressor`."""
    return FixSizeL2Compressor(fix_kv_size, keep_ratio, **options).compress(past_key_values)
