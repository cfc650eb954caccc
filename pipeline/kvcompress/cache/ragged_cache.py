"""The compressed cache: a transformers `Cache` to pass as `past_key_values`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.cache.layer import CacheState, CompressedLayer
from kvcompress.cache.select.exchange import select_due
from kvcompress.cache.select.layer import SelectLayer
from kvcompress.core.errors import CacheUseError


class RaggedCache(Cache):
    """Cache whose layers keep, head by head, what their method tells them to.

    It reports tokens *seen* as its sequence length. Only a model inside `attached` can read it; any other model gets a
    `CacheUseError`. For inference: gradients do not flow through held keys and values.

    If a model is split among processes (`kvcompress.models.tensor_parallel`), each process has a cache of its own heads:
    bytes, `held` and `positions` are theirs, and KV head 0 is the first of them.
    """

    def __init__(self, layers: Sequence[CompressedLayer], shared: CacheState, maker: object = None) -> None:
        super().__init__(layers=list(layers))
        self.shared = shared
        self.maker = maker  # the compressor that made this cache

    @classmethod
    def from_dynamic(cls, source: Cache, empty: "RaggedCache", mask: Tensor | None = None) -> "RaggedCache":
        """Fill the cache `empty` from a plain `DynamicCache` and return it; the source keeps its contents.

        `mask` is the 2-D attention mask over the tokens seen, needed for a left-padded batch.
        """
        seen = source.get_seq_length()
        if mask is not None:
            empty.shared.padding.note(mask, 0, seen)
        for full, layer in zip(source.layers, empty.compressed_layers, strict=True):
            # A sliding layer holds only the last columns; the earlier ones are out of the model's sight.
            layer.fill(full.keys, full.values, first=seen - full.keys.shape[2])
        return empty

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        layers: list[CompressedLayer] = self.layers
        return layers

    @property
    def seen(self) -> int:
        """Tokens seen (columns of a padded batch)."""
        return self.compressed_layers[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of K and V held now: the size of the real storage, spare slots included."""
        return sum(layer.nbytes for layer in self.compressed_layers)

    @property
    def peak_nbytes(self) -> int:
        """Most bytes of K and V held since the last `reset`, copies during growth included.

        Temporary tensors of the layer at work are not counted: its new keys and values, and the copy of held keys that
        attention over a chunk makes.
        """
        return self.shared.meter.peak

    @property
    def evidence_nbytes(self) -> int:
        """Bytes kept besides K and V by heads that select keys: last queries, positions, attention totals."""
        return sum(layer.evidence_nbytes for layer in self.compressed_layers)

    @property
    def held_nbytes(self) -> int:
        """Bytes of everything kept from pass to pass: K, V and evidence."""
        return self.nbytes + self.evidence_nbytes

    def held(self) -> list[list[int]]:
        """Return the tokens held, `[layer][kv_head]` (columns of a padded batch)."""
        return [layer.held() for layer in self.compressed_layers]

    def __repr__(self) -> str:
        held, heads = self.held(), self.compressed_layers[0].heads
        share = f"{sum(map(sum, held)) / (len(held) * heads * self.seen):.1%}" if self.seen else "nothing"
        low, high = min(map(min, held)), max(map(max, held))
        of_head = f"{low}" if low == high else f"{low} to {high}"
        part = self.shared.shard
        evidence = f" {self.evidence_nbytes / 1e6:,.1f} MB to select by," if self.evidence_nbytes else ""
        shard = f" of part {part.index + 1} of {part.count}" if part.count > 1 else ""
        return (
            f"RaggedCache({len(held)} layers × {heads} KV heads{shard}, {self.shared.prefill} prefill:"
            f" {self.seen} tokens seen, {of_head} held a head, {share} of a full cache, {self.nbytes / 1e6:,.1f} MB,"
            f"{evidence} peak {self.peak_nbytes / 1e6:,.1f} MB)"
        )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx >= len(self.layers):
            raise CacheUseError(f"this cache was made for {len(self.layers)} layers; the model has a layer {layer_idx}")
        if layer_idx == 0:
            self._require_whole()
            self.select_due()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def select_due(self) -> None:
        """Run the selections that are due before the next pass. A captured step leaves them out."""
        select_due([layer for layer in self.layers if isinstance(layer, SelectLayer)])

    def _require_whole(self) -> None:
        """Raise `CacheUseError` if an earlier pass broke off between two layers, or within the first."""
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
        """Allocate room for `tokens` tokens in all: until then no storage grows or moves.

        Unbounded heads take that many slots, bounded heads at most their capacity; `nbytes` counts them at once. Raises
        `CacheUseError` before the prompt is complete, because only then the shape of the storage is known.
        """
        if not self.seen:
            raise CacheUseError("reserve: no token was seen yet; run the prompt first")
        for layer in self.compressed_layers:
            layer.reserve(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; a positive number is the length to crop to.

        Exact or refused: a bounded head can take back only what it has not overwritten, or what was overwritten since
        `activate_past_recording` (called by assisted decoding) and the last crop. Raises `CacheUseError` otherwise, and
        leaves the cache unchanged.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        tokens = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seen - tokens_to_remove, 0)
        if tokens > self.seen:
            raise CacheUseError(f"cannot take back {tokens} tokens, only {self.seen} were seen")
        if tokens == self.seen:
            self.reset()  # the next prompt may have another batch size
            return
        for index, layer in enumerate(self.compressed_layers):
            if not layer.can_crop(tokens):
                raise CacheUseError(
                    f"crop: layer {index} has evicted keys that it held {tokens} tokens ago; call"
                    " activate_past_recording before a forward pass that may be taken back"
                )
        for layer in self.compressed_layers:
            layer.crop(-tokens)

    def activate_past_recording(self) -> None:
        """Keep overwritten keys until the next `crop`. Raises `CacheUseError` if heads select keys by content."""
        for layer in self.compressed_layers:
            layer.require_recordable()
        super().activate_past_recording()

    def reset(self) -> None:
        """Drop the contents, free the storage, and start anew."""
        super().reset()
        self.shared.padding.set(None)
        self.shared.meter.peak = self.shared.meter.held

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row of the batch the past of the row at `beam_idx`, `[batch]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times, copies next to each other."""
        if self.batch_size > 0:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of the batch at `indices`, `[new batch]`, in that order (or bool `[batch]`)."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        for layer in self.compressed_layers:
            layer.select_rows(rows)
        columns = self.shared.padding.columns
        if columns is not None:
            self.shared.padding.set(columns.index_select(0, rows.to(columns.device)))
