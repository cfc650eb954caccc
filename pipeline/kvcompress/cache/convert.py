"""From a filled `DynamicCache` to a compressed one."""

from torch import Tensor
from transformers.cache_utils import Cache

from kvcompress.cache.ragged_cache import RaggedCache


def convert(source: Cache, into: RaggedCache, mask: Tensor | None = None) -> RaggedCache:
    """Copy into an empty cache what its layers keep of a plain `DynamicCache` (see `Architecture.of_cache`).

    `mask` is the 2-D attention mask over the tokens seen, needed where the batch is left-padded. The source is left as
    it was; its memory is free once its last owner lets go of it.
    """
    seen = source.get_seq_length()
    if mask is not None:
        into.shared.padding.note(mask, 0, seen)
    for full, layer in zip(source.layers, into.compressed_layers, strict=True):
        # A sliding layer holds only the last columns; those before are out of the model's sight for good.
        layer.fill(full.keys, full.values, first=seen - full.keys.shape[2])
    into.shared.beside.join()
    return into
