"""Runs a model over documents and collects the sums of its attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from kvcompress.collect.induction import induction_scores
from kvcompress.collect.observer import AttentionObserver, observing, require_observable
from kvcompress.collect.params import CollectParams
from kvcompress.collect.standard_errors import precise_enough
from kvcompress.collect.sums import HEAD_SUMS, AttentionSums
from kvcompress.core.errors import InputError
from kvcompress.models import distributed
from kvcompress.models.load import input_device
from kvcompress.models.tensor_parallel import gather_heads, shard_of


def collect_attention(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    chunk_size: int = 512,
    progress: bool = True,
    stopping: CollectParams | None = None,
) -> AttentionSums:
    """Sum the attention of `documents`, each a 1-D tensor of token ids, and add one induction probe.

    A document is fed in chunks of `chunk_size` tokens with a KV cache, so chunking changes memory and never the result.
    Several processes (`kvcompress.models.distributed`) each read a share of the documents and all get the sums of all;
    processes that hold shards of one model each read all documents and get the sums of all heads.

    With `stopping`, collecting ends early once standard errors are small (`standard_errors.precise_enough`, checked
    after every `stopping.stop_every` documents, so that any number of processes reads the same documents).

    Raises `UnsupportedModelError` if the model's attention cannot be observed, and `InputError` for no documents, or a
    document of one token or longer than the model's context.
    """
    architecture = require_observable(model)
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}, expected at least 1")
    for tokens in documents:
        if len(tokens) > architecture.max_context:
            raise InputError(
                f"a document of {len(tokens)} tokens exceeds the model's context of {architecture.max_context}"
            )
        if len(tokens) < 2:
            raise InputError(f"a document has {len(tokens)} tokens, expected at least 2")
    if rope_depends_on_length(model.config):
        chunk_size = max(map(len, documents), default=1)  # a chunk would be rotated as if the text ended with it
    if not documents:
        raise InputError("there are no documents to collect attention from")
    layers, heads = architecture.num_layers, architecture.num_attention_heads
    own_heads = heads // shard_of(model.config).count
    total = AttentionSums.none(layers, heads)
    size = len(documents) if stopping is None else stopping.stop_every
    rounds = [documents[first : first + size] for first in range(0, len(documents), size)]
    shares = [[batch[i] for i in distributed.mine([cost(len(tokens)) for tokens in batch])] for batch in rounds]
    amount = sum(len(tokens) for own in shares for tokens in own)
    with torch.inference_mode(), distributed.progress(amount, "attention", "tok", progress) as bar:
        for batch, own in zip(rounds, shares, strict=True):
            found = AttentionSums.none(layers, own_heads)
            for tokens in own:
                found += observe(model, tokens, chunk_size, bar).sums(layers)
            sums = {
                name: gather_heads(tensor, 1, model.config) if name in HEAD_SUMS else tensor
                for name, tensor in distributed.summed(found.tensors).items()
            }
            total += AttentionSums(sums, len(batch), max(map(len, batch)))
            if stopping and precise_enough(total, stopping):  # every process has the same sums and decides alike
                break
        total.tensors["induction"] += gather_heads(induction_scores(model, layers), 1, model.config)
        total.tensors["probes"] += 1
    return total


def observe(model: PreTrainedModel, tokens: Tensor, chunk_size: int, bar: "tqdm[Any]") -> AttentionObserver:
    """Run the model over one document under observation."""
    with observing(model) as observer:
        cache = DynamicCache() if len(tokens) > chunk_size else None
        for chunk in tokens.to(input_device(model)).split(chunk_size):
            model.base_model(chunk[None], past_key_values=cache, use_cache=cache is not None)
            bar.update(len(chunk))
    return observer


def cost(tokens: int) -> float:
    """Estimate the time for a document, in tokens of a short one: attention grows with the square of its length."""
    return tokens * (1 + tokens / 4096)


def rope_depends_on_length(config: Any) -> bool:
    """Return True if a key's rotation changes with the length of the text so far (dynamic NTK, LongRoPE)."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    blocks = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return any(block.get("rope_type") in ("dynamic", "longrope") for block in blocks)
