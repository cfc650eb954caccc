"""The judge: attention with every head's mask written out, in one pass over the whole text.

Nothing is cached, nothing is clever: for every query and key it is asked whether the head may see that key, positions
counted in real tokens, and a masked softmax follows in float32 (float64 for a float64 model). What a compressed cache
computes, in however many passes, has to agree with this to float rounding; a pruned head contributes exactly zero.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from kvcompress.cache.select.record import Choice, Choices, of_head
from kvcompress.core.errors import CacheUseError, InputError
from kvcompress.core.retention import Retention
from kvcompress.models.attention_interface import replaced_attention
from kvcompress.models.tensor_parallel import shard_of

NAME = "kvcompress_oracle"


class _Verdict:
    """What the KV heads of one layer keep, up to which column the prompt attends in full, and what heads chose."""

    def __init__(self, kept: Sequence[Retention], prompt_length: int, choices: list[Choice]) -> None:
        self.kept, self.prompt_length, self.choices = kept, prompt_length, choices


_VERDICTS: "WeakKeyDictionary[nn.Module, _Verdict]" = WeakKeyDictionary()


def head_mask(kept: Retention, positions: Tensor) -> Tensor:
    """Which keys the queries of a head see, bool `[batch, query, key]`, by real positions `[batch, column]`."""
    query, key = positions[:, :, None], positions[:, None, :]
    if kept.pruned:
        return torch.zeros_like(query == key)
    if kept.unbounded:
        return key <= query
    return (key <= query) & ((key < kept.sinks) | (key > query - kept.window))


def choice_mask(choices: list[Choice], head: int, positions: Tensor) -> Tensor:
    """Which keys a head that selects sees besides sinks and window, bool `[batch, query, key]`, later keys included.

    Before the first choice these are all. After one they are what it chose, and what it let go until that is overwritten.
    """
    batch, length = positions.shape
    seen = torch.ones(batch, length, length, dtype=torch.bool, device=positions.device)
    for column, chosen, leaving in of_head(choices, head):
        for query in range(column, length):  # until the next choice, which writes its own over it
            now = torch.cat((chosen, leaving[:, query - column + 1 :]), dim=1).to(positions.device)
            seen[:, query] = (positions[:, :, None] == now[:, None, :]).any(-1)
    return seen


def oracle_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention `[batch, query_head, query, head_dim]` -> `[batch, query, query_head, head_dim]`.

    `attention_mask` is the model's own, bool `[batch, 1, query, key]`: causal, padding, and its sliding window if any.
    """
    verdict = _VERDICTS[module]
    batch, query_heads, length, size = query.shape
    if key.shape[2] != length or attention_mask is None:
        raise CacheUseError("the oracle reads a whole text in one pass: call the model with use_cache=False")
    if len(verdict.kept) != key.shape[1]:
        raise InputError(f"the plan has {len(verdict.kept)} KV heads a layer, the model has {key.shape[1]}")
    # The last query sees every real column of its row, unless a sliding window hides some; the diagonal never lies.
    real = attention_mask.expand(batch, 1, length, length)[:, 0].diagonal(dim1=1, dim2=2)  # [batch, column]
    positions = real.long().cumsum(-1) - 1
    in_prompt = torch.arange(length, device=query.device) < verdict.prompt_length
    out = torch.zeros(batch, query_heads, length, value.shape[-1], dtype=value.dtype, device=value.device)
    exact = torch.promote_types(query.dtype, torch.float32)
    for head in range(query_heads):
        kv_head = head // (query_heads // key.shape[1])
        seen = head_mask(verdict.kept[kv_head], positions) | in_prompt[None, :, None]
        if verdict.kept[kv_head].chosen:
            seen = seen | choice_mask(verdict.choices, kv_head, positions) & (
                positions[:, :, None] >= positions[:, None, :]
            )
        seen = seen & attention_mask[:, 0] & real[:, None, :]
        scores = query[:, head].to(exact) @ key[:, kv_head].to(exact).transpose(1, 2)
        scores = scores * (size**-0.5 if scaling is None else scaling)
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        weights = torch.where(seen, weights, 0.0)  # a query that sees nothing gets NaN from softmax, and shall get zero
        out[:, head] = (weights @ value[:, kv_head].to(exact)).to(value.dtype)
    return out.transpose(1, 2), None


def oracle_mask(**kwargs: Any) -> Tensor | None:
    """The model's own mask, always written out."""
    mask: Tensor | None = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    return mask


AttentionInterface.register(NAME, oracle_attention)
AttentionMaskInterface.register(NAME, oracle_mask)


@contextmanager
def judged(
    model: PreTrainedModel,
    layers: Sequence[Sequence[Retention]],
    prefill: str = "streaming",
    prompt_length: int | None = None,
    choices: Choices | None = None,
) -> Iterator[PreTrainedModel]:
    """Let `model`'s heads see, in one pass with `use_cache=False`, what `layers[layer][kv_head]` lets them see.

    With `prefill="exact"` the first `prompt_length` columns attend in full, with "streaming" none does. What heads that
    select see is not in their retention: `choices` replays what a cache chose (`recorded_choices`). Of a model split among
    processes `layers` has all KV heads, and `choices` are those of the process's own cache.
    """
    if choices is None and any(kept.chosen for layer in layers for kept in layer):
        raise InputError("heads of this plan select keys: give judged the choices that a cache recorded")
    if (prefill == "exact") != (prompt_length is not None) or prefill not in ("exact", "streaming"):
        raise InputError(f"prefill is {prefill!r} with prompt_length {prompt_length}: only 'exact' has, and needs, one")
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    if {module.layer_idx for module in modules} != set(range(len(layers))):
        raise InputError(f"the plan has {len(layers)} layers, the model has {len({m.layer_idx for m in modules})}")
    shard = shard_of(model.config)
    for module in modules:
        index = int(module.layer_idx)
        own = layers[index][shard.own(len(layers[index]))]
        _VERDICTS[module] = _Verdict(own, prompt_length or 0, choices[index] if choices else [])
    try:
        with replaced_attention(model, NAME):
            yield model
    finally:
        for module in modules:
            del _VERDICTS[module]
