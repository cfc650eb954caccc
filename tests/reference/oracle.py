"""Mask oracle: attention with every head's mask written out, in one pass over the whole text.

Nothing is cached. The mask says for every query and key whether the head sees that key, with positions in real tokens;
a masked softmax follows in float32 (float64 for a float64 model). A compressed cache must agree with this to float
rounding, in however many passes it reads the text. A pruned head contributes exactly zero.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from kvcompress.cache.select.records import SelectionRecord, SelectionRecords
from kvcompress.core.errors import CacheUseError, InputError
from kvcompress.core.retention import Retention
from kvcompress.models.attention_interface import replaced_attention
from kvcompress.models.tensor_parallel import shard_of
from tests.reference.recorded_selections import of_head

NAME = "kvcompress_oracle"


@dataclass(frozen=True)
class _Rule:
    """Retention of one layer's KV heads, columns of the prompt that attend in full, and recorded selections."""

    retention: Sequence[Retention]
    prompt_length: int
    records: list[SelectionRecord]


_RULES: "WeakKeyDictionary[nn.Module, _Rule]" = WeakKeyDictionary()


def head_mask(kept: Retention, positions: Tensor) -> Tensor:
    """Return the keys that the queries of a head see, bool `[batch, query, key]`, from positions `[batch, column]`."""
    query, key = positions[:, :, None], positions[:, None, :]
    if kept.pruned:
        return torch.zeros_like(query == key)
    if kept.unbounded:
        return key <= query
    return (key <= query) & ((key < kept.sinks) | (key > query - kept.window))


def selection_mask(records: list[SelectionRecord], head: int, positions: Tensor) -> Tensor:
    """Return the keys a selecting head sees besides sinks and window, bool `[batch, query, key]`, later keys included.

    Before the first selection these are all keys. After it they are the selected keys, and rejected ones until they are
    overwritten.
    """
    batch, length = positions.shape
    seen = torch.ones(batch, length, length, dtype=torch.bool, device=positions.device)
    for column, chosen, leaving in of_head(records, head):
        for query in range(column, length):  # the next selection overwrites the rest
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
    rule = _RULES[module]
    batch, query_heads, length, size = query.shape
    if key.shape[2] != length or attention_mask is None:
        raise CacheUseError("the oracle reads a whole text in one pass: call the model with use_cache=False")
    if len(rule.retention) != key.shape[1]:
        raise InputError(f"the plan has {len(rule.retention)} KV heads a layer, the model has {key.shape[1]}")
    # The last query sees every real column of its row, unless a sliding window hides some; the diagonal never lies.
    real = attention_mask.expand(batch, 1, length, length)[:, 0].diagonal(dim1=1, dim2=2)  # [batch, column]
    positions = real.long().cumsum(-1) - 1
    in_prompt = torch.arange(length, device=query.device) < rule.prompt_length
    out = torch.zeros(batch, query_heads, length, value.shape[-1], dtype=value.dtype, device=value.device)
    precise = torch.promote_types(query.dtype, torch.float32)
    for head in range(query_heads):
        kv_head = head // (query_heads // key.shape[1])
        seen = head_mask(rule.retention[kv_head], positions) | in_prompt[None, :, None]
        if rule.retention[kv_head].chosen:
            seen = seen | selection_mask(rule.records, kv_head, positions) & (
                positions[:, :, None] >= positions[:, None, :]
            )
        seen = seen & attention_mask[:, 0] & real[:, None, :]
        scores = query[:, head].to(precise) @ key[:, kv_head].to(precise).transpose(1, 2)
        scores = scores * (size**-0.5 if scaling is None else scaling)
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        weights = torch.where(seen, weights, 0.0)  # a query that sees nothing gets NaN from softmax, and shall get zero
        out[:, head] = (weights @ value[:, kv_head].to(precise)).to(value.dtype)
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
    records: SelectionRecords | None = None,
) -> Iterator[PreTrainedModel]:
    """Make `model`'s heads see, in one pass with `use_cache=False`, what `layers[layer][kv_head]` retains.

    With `prefill="exact"` the first `prompt_length` columns attend in full, with "streaming" none does. Retention alone
    does not define what selecting heads see: `records` replays the selections of a cache (`recorded_choices`). For a
    model split
    among processes `layers` has all KV heads, and `records` are those of the process's own cache.
    """
    if records is None and any(kept.chosen for layer in layers for kept in layer):
        raise InputError("heads of this plan select keys: pass the selections that a cache recorded")
    if (prefill == "exact") != (prompt_length is not None) or prefill not in ("exact", "streaming"):
        raise InputError(f"prefill is {prefill!r} with prompt_length {prompt_length}: only 'exact' has, and needs, one")
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    if {module.layer_idx for module in modules} != set(range(len(layers))):
        raise InputError(f"the plan has {len(layers)} layers, the model has {len({m.layer_idx for m in modules})}")
    shard = shard_of(model.config)
    for module in modules:
        index = int(module.layer_idx)
        own = layers[index][shard.own(len(layers[index]))]
        _RULES[module] = _Rule(own, prompt_length or 0, records[index] if records else [])
    try:
        with replaced_attention(model, NAME):
            yield model
    finally:
        for module in modules:
            del _RULES[module]
