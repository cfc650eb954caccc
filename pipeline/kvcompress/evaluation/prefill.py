"""One exact prefill for many caches: the model reads a prompt once, and every contender's cache is filled from it.

In an exact prefill the prompt attends in full, whatever is kept of it afterwards. So queries, keys and values of the
prompt are the same for all contenders, and the forward pass is shared. What each cache then holds is what it would hold
if the model had read the prompt with it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache.layer import CacheState, CompressedLayer
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.ragged_layer import RaggedLayer
from kvcompress.core.retention import FULL
from kvcompress.methods.compressor import Compressor, UniformCompressor
from kvcompress.models.architecture import Architecture
from kvcompress.models.load import input_device


class SharingLayer(RaggedLayer):
    """A layer of a full cache that hands the prompt on to `others`, the same layer of other caches."""

    others: Sequence[CompressedLayer] = ()

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, dropout: float) -> Tensor:
        out = super().attend(query, keys, values, scale, dropout)
        for layer in self.others:
            layer.fill_from_prompt(query.detach(), keys.detach(), values.detach(), scale)
        return out


class SharingCompressor(UniformCompressor):
    """A full cache, from which empty `caches` are filled while a model reads its prompt."""

    def __init__(self, caches: Sequence[RaggedCache]) -> None:
        super().__init__(FULL)
        self.caches = caches

    def build_layers(self, architecture: Architecture, shared: CacheState) -> Sequence[CompressedLayer]:
        heads = architecture.num_key_value_heads // shared.shard.count
        found = [SharingLayer([FULL] * heads, shared, window) for window in architecture.sliding_windows]
        for i, layer in enumerate(found):
            layer.others = [cache.compressed_layers[i] for cache in self.caches]
        return found


def read_prompt(
    model: PreTrainedModel, prompt: Tensor, compressors: Mapping[str, Compressor]
) -> dict[str, RaggedCache]:
    """Read a prompt `[token]` once and return each compressor's cache of it, filled by an exact prefill.

    Raises `InputError` or `UnsupportedModelError` if a method cannot serve the model.
    """
    caches = {name: compressor.new_cache(model.config) for name, compressor in compressors.items()}
    sharing = SharingCompressor(list(caches.values()))
    with torch.inference_mode(), sharing.attached(model):
        full = sharing.new_cache(model.config)
        model(prompt[None].to(input_device(model)), past_key_values=full, use_cache=True, logits_to_keep=1)
    return caches
