"""The compressed cache: what a model takes as `past_key_values`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.cache.layer import CompressedLayer, Shared
from kvcompress.cache.select.batched import choose_due
from kvcompress.core.errors import CacheUseError


class RaggedCache(Cache):
    """A transformers `Cache` whose layers keep, head by head, only what they were told to keep.

    Reports tokens *seen* as its sequence length. Readable only by a model inside `attached`; any other model gets a
    `CacheUseError`. For inference: gradients do not flow through what is held.

    Of a model split among processes (`kvcompress.models.tensor_parallel`) each one's cache has that process's heads alone: bytes, `held`
    and `positions` are theirs, and KV head 0 is the first of them.
    """

    def __init__(self, layers: Sequence[CompressedLayer], shared: Shared, maker: object = None) -> None:
        super().__init__(layers=list(layers))
        self.compressed_layers[-1].last = True
        self.shared = shared
        self.maker = maker  # the compressor that made it, which need not ask again whether it did

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        layers: list[CompressedLayer] = self.layers
        return layers

    @property
    def seen(self) -> int:
        """Tokens seen (columns, where the batch is padded)."""
        return self.compressed_layers[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of K and V held now: the size of the real storage, slack included."""
        return sum(layer.nbytes for layer in self.compressed_layers)

    @property
    def peak_nbytes(self) -> int:
        """The most bytes of K and V ever held since the last `reset`, copies during growth included.

        What a pass computes for the one layer at work is the model's and not counted: that layer's new keys and values,
        and the copy of those held beside them while a chunk is read. On a GPU that also goes for the keys, values and
        queries of a prompt in the layer before, where heads still choose among them.
        """
        return self.shared.meter.peak

    @property
    def evidence_nbytes(self) -> int:
        """Bytes kept besides K and V by heads that choose keys: the last queries, positions, sums of attention."""
        return sum(layer.evidence_nbytes for layer in self.compressed_layers)

    @property
    def held_nbytes(self) -> int:
        """Bytes of all that is kept from pass to pass: K, V and evidence."""
        return self.nbytes + self.evidence_nbytes

    def held(self) -> list[list[int]]:
        """Tokens held, `[layer][kv_head]` (columns, where the batch is padded)."""
        return [layer.held() for layer in self.compressed_layers]

    def __repr__(self) -> str:
        held, heads = self.held(), self.compressed_layers[0].heads
        share = f"{sum(map(sum, held)) / (len(held) * heads * self.seen):.1%}" if self.seen else "nothing"
        low, high = min(map(min, held)), max(map(max, held))
        spread = f"{low}" if low == high else f"{low} to {high}"
        shard = self.shared.shard
        beside = f" {self.evidence_nbytes / 1e6:,.1f} MB to choose by," if self.evidence_nbytes else ""
        which = f" of part {shard.index + 1} of {shard.count}" if shard.count > 1 else ""
        return (
            f"RaggedCache({len(held)} layers × {heads} KV heads{which}, {self.shared.prefill} prefill:"
            f" {self.seen} tokens seen, {spread} held a head, {share} of a full cache, {self.nbytes / 1e6:,.1f} MB,"
            f"{beside} peak {self.peak_nbytes / 1e6:,.1f} MB)"
        )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx >= len(self.layers):
            raise CacheUseError(f"this cache was made for {len(self.layers)} layers, the model has a layer {layer_idx}")
        if layer_idx == 0:
            self._require_whole()
            self.choose_due()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def choose_due(self) -> None:
        """Before a pass, let all heads choose keys that have to do it now; a captured step leaves it out."""
        self.shared.beside.join()
        choose_due(self.compressed_layers)

    def _require_whole(self) -> None:
        """Raise `CacheUseError` where an earlier pass ended in an error between two layers, or within the first."""
        for index, layer in enumerate(self.compressed_layers):
            if layer.seen != self.seen:
                raise CacheUseError(
                    f"an earlier forward pass broke off: layer 0 saw {self.seen} tokens and layer {index} {layer.seen};"
                    " `reset` the cache and run the text again"
                )
        self.compressed_layers[0].require_whole()

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first token."""
        like = self.compressed_layers[0].like
        return -1 if like is None else like[0]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all: until as many are seen no storage grows or moves.

        Heads without a bound take that many slots, bounded heads no more than their capacity; `nbytes` counts them at
        once. Raises `CacheUseError` before the prompt is complete, because only then what will be held has a shape.
        """
        if not self.seen:
            raise CacheUseError("reserve: no token was seen yet, room can be made once the prompt is in the cache")
        for layer in self.compressed_layers:
            layer.reserve(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; a positive number is the length to crop to.

        Exact or refused: a bounded head can take back only what it has not overwritten, or what was overwritten since
        `activate_past_recording` (assisted decoding calls it) and the last crop. Raises `CacheUseError` otherwise, and
        leaves the cache as it was.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        tokens = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seen - tokens_to_remove, 0)
        if tokens > self.seen:
            raise CacheUseError(f"cannot take back {tokens} tokens, only {self.seen} were seen")
        if tokens == self.seen:
            self.reset()  # nothing is left, and the next prompt may have another batch
            return
        for index, layer in enumerate(self.compressed_layers):
            if not layer.can_crop(tokens):
                raise CacheUseError(
                    f"crop: layer {index} has forgotten keys that it would need {tokens} tokens ago; call"
                    " activate_past_recording before the forward pass that may be taken back"
                )
        for layer in self.compressed_layers:
            layer.crop(-tokens)

    def activate_past_recording(self) -> None:
        """Keep what is overwritten until the next `crop`. Raises `CacheUseError` where heads choose keys by content."""
        for layer in self.compressed_layers:
            layer.require_recordable()
        super().activate_past_recording()

    def reset(self) -> None:
        """Forget everything, free the storage, and start as new."""
        self.shared.beside.join()
        super().reset()
        self.shared.padding.set(None)
        self.shared.meter.peak = self.shared.meter.held

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row of the batch the past of the row at `beam_idx`, `[batch]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times, copies side by side."""
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of the batch at `indices`, `[new batch]`, in that order (or bool `[batch]`)."""
        self.shared.beside.join()
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        for layer in self.compressed_layers:
            layer.select_rows(rows)
        columns = self.shared.padding.columns
        if columns is not None:
            self.shared.padding.set(columns.index_select(0, rows.to(columns.device)))
