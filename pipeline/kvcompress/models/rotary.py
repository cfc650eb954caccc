"""Rotary embedding: turns rotated queries and keys by further positions, for caches that renumber positions.

Rotary embedding is a group of rotations: turning a vector rotated for position p by c - p gives the vector rotated for
position c. The turn is computed from the exact integer difference in float32, so the error does not grow with the text.
Supported is the half-split layout of Llama and GPT-NeoX on the first `dim` dimensions of each head, with plane speeds
that do not depend on the length of the text.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvcompress.core.errors import UnsupportedModelError

# Model types whose keys reach the cache rotated in the half-split layout; others interleave or do not rotate.
HALF_SPLIT = frozenset(("gpt_neox", "llama", "mistral", "mixtral", "phi", "qwen2", "qwen3", "qwen3_moe", "stablelm"))
# Types that scale the planes' speeds once for all lengths; yarn also scales vectors, which turning does not change.
SCALED = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rotation:
    """Rotation of the first `dim` dimensions of a head with base `theta` (RoFormer, arXiv 2104.09864).

    speeds: radians by which each plane turns a position, if they differ from those of the base [default: none].
    """

    dim: int
    theta: float
    speeds: tuple[float, ...] = ()

    @classmethod
    def of(cls, config: Any, asker: str = 'positions="cache"') -> "Rotation":
        """Read a transformers config. Raises `UnsupportedModelError` in the name of `asker` for an unknown rotation."""
        config = config.get_text_config(decoder=True)
        if config.model_type not in HALF_SPLIT:
            raise UnsupportedModelError(
                f"{asker} knows the rotary embedding of {', '.join(sorted(HALF_SPLIT))}, not of {config.model_type!r}"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        kind = rope.get("rope_type", "default")
        if kind not in ("default", *SCALED) or "rope_theta" not in rope:
            known = f"default, {', '.join(SCALED)}"
            raise UnsupportedModelError(f"{asker} needs a rotary embedding of type {known}, this model's is {kind!r}")
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = int(head * rope.get("partial_rotary_factor", 1.0))
        if dim % 2:
            raise UnsupportedModelError(f"{asker} needs an even number of rotary dimensions, not {dim}")
        speeds = () if kind == "default" else tuple(ROPE_INIT_FUNCTIONS[kind](config)[0].tolist())
        return cls(dim, float(rope["rope_theta"]), speeds)

    def cos_sin(self, by: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the planes' angles at positions `by`, float32 `[..., dim / 2]` each."""
        angles = by[..., None].float() * speeds_of(self, by.device)
        return angles.cos(), angles.sin()

    def turn(self, vectors: Tensor, by: Tensor) -> Tensor:
        """Turn `[..., query, head_dim]` by positions `by`, integers that broadcast against `[..., query]`."""
        return self.turn_by(vectors, *self.cos_sin(by))

    def turn_by(self, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn `[..., query, head_dim]` by angles given as cosines and sines, which broadcast against its planes."""
        rotated, rest = vectors[..., : self.dim].float(), vectors[..., self.dim :]
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat(
            (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), dim=-1
        ).to(vectors.dtype)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


@lru_cache(maxsize=32)
def speeds_of(rotation: Rotation, device: torch.device) -> Tensor:
    """Return the radians by which each plane turns a position, float32 `[dim / 2]`."""
    if rotation.speeds:
        return torch.tensor(rotation.speeds, device=device)
    return 1 / rotation.theta ** (torch.arange(0, rotation.dim, 2, dtype=torch.float32, device=device) / rotation.dim)
