"""Attention function that reads compressed caches, and the context in which a model uses it.

Registered with transformers as "kvcompress", both as attention and as mask function: without the second, transformers
would build no mask and padding would go unnoticed. Given no cache or a `DynamicCache`, both do exactly what
transformers' SDPA attention does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcompress.cache.layer import DeferredKV
from kvcompress.cache.padding import MaskLength
from kvcompress.core.errors import CacheUseError, UnsupportedModelError
from kvcompress.models.attention_interface import CAPPED_OR_LEARNED, refuse_terms, use_attention

NAME = "kvcompress"


def compressed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | DeferredKV,
    value: Tensor | DeferredKV,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention `[batch, query_head, query, head_dim]` -> `[batch, query, query_head, head_dim]`, and no weights."""
    if not isinstance(key, DeferredKV):
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    if attention_mask is not None:
        raise CacheUseError("a compressed cache takes a 2-D attention_mask [batch, seen + new], got a ready-made mask")
    refuse_terms(CAPPED_OR_LEARNED, kwargs, "a compressed cache")
    if query.requires_grad and module.training and torch.is_grad_enabled():
        raise CacheUseError("a compressed cache is for inference: call model.eval(), gradients do not flow through it")
    layer = key.layer
    if layer.sliding_window is None and kwargs.get("sliding_window") is not None:
        # A cache converted without the model's config learns the model's sliding window here.
        layer.learn_sliding_window(kwargs["sliding_window"])
    return layer.attend(query, key.keys, key.values, scaling, dropout), None


def compressed_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Record the padding in the compressed cache of this pass; without one, return SDPA's own mask."""
    if not isinstance(kv_length, MaskLength):
        mask: Tensor | None = sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        )
        return mask
    if not allow_is_causal_skip:
        raise UnsupportedModelError("a compressed cache cannot serve this model: its attention is not plainly causal")
    kv_length.padding.note(attention_mask, int(q_offset), q_length)
    return None


AttentionInterface.register(NAME, compressed_attention)
AttentionMaskInterface.register(NAME, compressed_mask)


# Number of contexts a model is attached in, and its attention before the first of them.
_ATTACHED: "WeakKeyDictionary[PreTrainedModel, tuple[int, str]]" = WeakKeyDictionary()
_LOCK = Lock()


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Make `model` read compressed caches in this context and restore its own attention on exit or exception.

    Re-entrant, across threads and in any order of exits; several models can be attached at once. Raises
    `UnsupportedModelError` for a model whose attention cannot be replaced.
    """
    with _LOCK:
        users, before = _ATTACHED.get(model, (0, model.config._attn_implementation))
        if not users:
            use_attention(model, NAME)
        _ATTACHED[model] = users + 1, before
    try:
        yield model
    finally:
        with _LOCK:
            users, before = _ATTACHED.pop(model)
            if users > 1:
                _ATTACHED[model] = users - 1, before
            elif model.config._attn_implementation != before:
                use_attention(model, before)
