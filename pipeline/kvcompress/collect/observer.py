"""Observes attention from inside: a registered attention function that computes exact attention block by block.

Every block of queries gets its weights, adds them to the layer's sums (`collect.sums`) and its output, and is freed.
The largest tensor at any time is one block `[query head, block, key]`, in a long text of a few heads. The output is
that of the model's own attention, so later layers see the true hidden states. Works for every architecture that
dispatches through transformers' attention interface, with grouped or multi-head attention, sliding windows and logit
soft-capping.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from kvcompress.collect.sums import HEAD_SUMS, AttentionSums, add_heads, count_queries, empty_layer
from kvcompress.core.errors import UnsupportedModelError
from kvcompress.models.architecture import Architecture
from kvcompress.models.attention_interface import LEARNED_TERMS, refuse_terms, replaced_attention
from kvcompress.models.load import input_device
from kvcompress.models.tensor_parallel import HeadShard, shard_of

NAME = "kvcompress_observe"
# device -> (most weights in a block, most queries in it): 4 MiB fit a CPU's cache, a GPU needs few and large launches
BLOCK_LIMITS = {"cpu": (2**20, 256), "cuda": (2**24, 4096)}
MASKED = torch.finfo(torch.float32).min  # finite, so that weight 0 times its logarithm is 0

_active: ContextVar["AttentionObserver | None"] = ContextVar("kvcompress_observer", default=None)


class AttentionObserver:
    """Collect one document's attention sums; the document may come in chunks with a KV cache between them."""

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Tensor]] = {}
        self.seen: dict[int, int] = {}
        self.windows: dict[int, int | None] = {}  # sliding window that each layer passes to attention
        self.kv_heads: dict[int, int] = {}

    def sums(self, num_layers: int) -> AttentionSums:
        """Return the document's sums. Raises `UnsupportedModelError` if a layer's attention was never called."""
        if len({layer["entropy"].shape for layer in self.layers.values()}) > 1:
            raise UnsupportedModelError("the model's layers have different numbers of heads, which is not supported")
        missing = sorted(set(range(num_layers)) - set(self.layers))
        if missing:
            raise UnsupportedModelError(
                f"layer {missing[0]} does not dispatch through transformers' attention interface "
                f"({len(missing)} of {num_layers} layers), so its attention cannot be observed"
            )
        return AttentionSums.stack([self.layers[i] for i in range(num_layers)], self.seen[0])

    def attend(
        self,
        layer: int,
        query: Tensor,  # [query_head, query, head_dim]
        key: Tensor,  # [kv_head, key, head_dim]
        value: Tensor,  # [kv_head, key, value_dim]
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Return the attention output `[query, query_head, value_dim]` and add the weights to the layer's sums."""
        heads, length, _ = query.shape
        kv_heads, keys, _ = key.shape
        first = self.seen.get(layer, 0)
        if keys != first + length:
            raise UnsupportedModelError(
                f"layer {layer} got {keys} keys after {first + length} tokens: a cache that drops keys hides attention"
            )
        self.seen[layer], self.windows[layer], self.kv_heads[layer] = keys, window, kv_heads
        if layer not in self.layers:
            self.layers[layer] = empty_layer(heads, query.device)
        sums = self.layers[layer]
        group = heads // kv_heads
        query = query.float().view(kv_heads, group, length, -1)
        transposed = key.float().transpose(1, 2)  # [kv_head, head_dim, key]
        output = value.new_empty(length, heads, value.shape[-1])
        start = 0
        while start < length:
            step = block_size(heads, first + start, query.device)
            stop = min(start + step, length)
            end = first + stop  # keys visible to this block
            position = torch.arange(first + start, end, device=query.device)
            visible = position + 1 if window is None else (position + 1).clamp(max=window)
            count_queries(sums, visible)
            share = heads_at_once(kv_heads, group * (stop - start) * end, query.device)
            for low in range(0, kv_heads, share):
                some = slice(low, low + share)
                of = slice(low * group, (low + share) * group)  # their query heads
                scores = torch.bmm(query[some, :, start:stop].flatten(1, 2) * scaling, transposed[some, :, :end])
                scores = scores.view(-1, stop - start, end)
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                hide(scores, first + start, window)
                log_weights = torch.log_softmax(scores, -1)
                weights = torch.exp(log_weights, out=scores)
                add_heads({name: sums[name][of] for name in HEAD_SUMS}, log_weights, weights, first + start, visible)
                grouped = weights.to(value.dtype).view(-1, group * (stop - start), end)
                mixed = torch.bmm(grouped, value[some, :end])  # [kv_head, group * query, value_dim]
                output[start:stop, of] = mixed.view(-1, stop - start, mixed.shape[-1]).transpose(0, 1)
            start = stop
        return output


def block_size(heads: int, keys: int, device: torch.device) -> int:
    """Return the number of queries in the next block, at least 4, such that all its weights stay within the limit.

    `keys` precede the block; a block of q queries sees keys + q.
    """
    elements, queries = BLOCK_LIMITS.get(device.type, BLOCK_LIMITS["cpu"])
    room = elements / heads  # q (keys + q) <= room
    return max(4, min(queries, int((keys**2 / 4 + room) ** 0.5 - keys / 2)))


def heads_at_once(kv_heads: int, elements: int, device: torch.device) -> int:
    """Return the number of KV heads, at least 1, whose weights fit a block together; each has `elements` weights."""
    room, _ = BLOCK_LIMITS.get(device.type, BLOCK_LIMITS["cpu"])
    return max(1, min(kv_heads, room // elements))


def hide(scores: Tensor, first: int, window: int | None) -> None:
    """Mask the scores of keys that are not visible to a query, in place; `scores` `[head, query, key]`."""
    queries, keys = scores.shape[1:]
    future = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu(1)
    scores[..., keys - queries :].masked_fill_(future, MASKED)
    if window is not None and keys > window:
        position = torch.arange(first, first + queries, device=scores.device)
        key = torch.arange(keys, device=scores.device)
        scores.masked_fill_(key <= position[:, None] - window, MASKED)


def observed_attention(
    module: nn.Module,
    query: Tensor,  # [1, query_head, query, head_dim]
    key: Tensor,  # [1, kv_head, key, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function that transformers calls; works inside `observing` and for a batch of one."""
    observer = _active.get()
    if observer is None:
        raise UnsupportedModelError(f"attention {NAME!r} works only inside `with observing(model)`")
    refuse_terms(LEARNED_TERMS, kwargs, "observed attention")
    if query.shape[0] != 1:
        raise UnsupportedModelError(f"attention is observed one text at a time, found a batch of {query.shape[0]}")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer = cast(int, module.layer_idx)
    output = observer.attend(layer, query[0], key[0], value[0], scaling, sliding_window, softcap)
    return output[None], None


AttentionInterface.register(NAME, observed_attention)


@contextmanager
def observing(model: PreTrainedModel) -> Iterator[AttentionObserver]:
    """Run the model with observed attention and yield the observer; the model's own attention returns on exit.

    Raises `UnsupportedModelError` if the model's attention cannot be replaced.
    """
    observer = AttentionObserver()
    with replaced_attention(model, NAME):
        token = _active.set(observer)
        try:
            yield observer
        finally:
            _active.reset(token)


PROBE_TOKENS = 48
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def require_observable(model: PreTrainedModel) -> Architecture:
    """Return the model's architecture. Raises `UnsupportedModelError` if its attention cannot be observed.

    A short run is the proof: with observed attention the hidden states must equal those of the model's own attention,
    within rounding. This finds any term that the observer does not know (a bias, a learned sink, another mask).
    """
    name, shape = type(model).__name__, Architecture.of_config(model.config)
    if model.training:
        raise UnsupportedModelError(f"{name} is in training mode, whose dropout hides attention: call model.eval()")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{name} does not dispatch through transformers' attention interface")
    length = min(PROBE_TOKENS, shape.max_context)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(length, device=input_device(model)) * 7919 + 11)[None] % vocabulary
    with torch.inference_mode():
        own = model.base_model(ids, use_cache=False).last_hidden_state.float()
        with observing(model) as observer:
            observed = model.base_model(ids, use_cache=False).last_hidden_state.float()
        observer.sums(shape.num_layers)
    require_as_described(name, shape, observer, shard_of(model.config))
    if not own.isfinite().all():
        raise UnsupportedModelError(f"{name} gives hidden states that are not finite numbers; are its weights damaged?")
    difference = float((own - observed).norm() / own.norm())
    if not difference <= PROBE_TOLERANCE.get(model.dtype, 1e-3):
        raise UnsupportedModelError(
            f"{name}: observed attention changes the hidden states by {difference:.1%},"
            " so this model's attention has a term that cannot be observed"
        )
    return shape


def require_as_described(name: str, shape: Architecture, observer: AttentionObserver, shard: HeadShard) -> None:
    """Raise `UnsupportedModelError` unless heads and windows observed are those of the config.

    Some models apply a sliding window through their mask alone, which the observer ignores.
    """
    for layer, window in enumerate(shape.sliding_windows):
        if observer.windows[layer] != window:
            raise UnsupportedModelError(
                f"{name}: layer {layer} has a sliding window of {window} by its config, but passes "
                f"{observer.windows[layer]} on to attention, so its mask cannot be observed"
            )
        found = (observer.layers[layer]["entropy"].shape[0], observer.kv_heads[layer])
        expected = (shape.num_attention_heads // shard.count, shape.num_key_value_heads // shard.count)
        if found != expected:
            raise UnsupportedModelError(
                f"{name}: layer {layer} has {found[0]} query and {found[1]} KV heads, its config says "
                f"{expected[0]} and {expected[1]}"
            )
