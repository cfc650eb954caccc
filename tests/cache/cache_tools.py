"""Tiny random models, plans and ways of feeding a text, shared by the tests of the cache and the methods."""

from functools import cache as memoised

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvcompress.cache.ragged_layer import clip
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention
from kvcompress.methods import HeadAwareCompressor
from kvcompress.models.architecture import Architecture

torch.set_num_threads(1)  # a second thread only waits in models this small

VOCABULARY = 96
SLIDING = 20  # Mistral's own window: shorter than the texts, longer than most of the plans' windows
LAYERS = 2

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # large enough that attention is far from uniform and a wrong key shows
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{**_COMMON, "hidden_size": 64}, num_attention_heads=4)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, num_attention_heads=6, num_key_value_heads=3)),
    "llama_mqa": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, num_attention_heads=4, num_key_value_heads=1)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**_COMMON, num_attention_heads=4, num_key_value_heads=2, sliding_window=SLIDING)
    ),
    "qwen3_hybrid": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **_COMMON,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=SLIDING,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=48,
            n_layer=LAYERS,
            n_head=4,
            n_positions=128,
            initializer_range=0.1,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
    ),
}


@memoised
def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model with fixed random weights; tests must leave it as they found it."""
    torch.manual_seed(1)
    return FAMILIES[family]().to(dtype).eval().requires_grad_(False)


def _mixed(kv_heads: int) -> list[list[Retention]]:
    kinds = [Retention(4, 8), FULL, Retention(0, 5), Retention(2, 13), PRUNED, Retention(1, 1), Retention(4, 8)]
    return [[kinds[(3 * layer + head) % len(kinds)] for head in range(kv_heads)] for layer in range(LAYERS)]


# name -> (KV heads a layer -> [layer][kv_head])
PLANS = {
    "all_full": lambda width: [[FULL] * width] * LAYERS,
    "window_1": lambda width: [[Retention(2, 1)] * width] * LAYERS,
    "no_sinks": lambda width: [[Retention(0, 7)] * width] * LAYERS,
    "window_beyond_text": lambda width: [[Retention(4, 500)] * width] * LAYERS,
    "pruned_heads": lambda width: [[PRUNED, *[Retention(3, 6)] * (width - 1)]] * LAYERS,
    "pruned_layer": lambda width: [[PRUNED] * width, [Retention(4, 4)] * width],
    "mixed": _mixed,
}


def plan_for(model: PreTrainedModel, name: str) -> list[list[Retention]]:
    """A plan of that name, `[layer][kv_head]`."""
    return PLANS[name](Architecture.of_config(model.config).num_key_value_heads)


def compressor_for(model: PreTrainedModel, name: str) -> HeadAwareCompressor:
    """The compressor of the plan of that name."""
    layers = tuple(tuple(layer) for layer in plan_for(model, name))
    return HeadAwareCompressor.from_plan(RetentionPlan(layers, model.config.num_attention_heads))


def clipped_plan(model: PreTrainedModel, name: str) -> list[list[Retention]]:
    """What the plan comes to on a model with a sliding window of its own."""
    limits = Architecture.of_config(model.config).sliding_windows
    return [[clip(kept, limits[i]) for kept in layer] for i, layer in enumerate(plan_for(model, name))]


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids without the pad id, `[batch, length]`."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and their mask, `[batch, length]`: row i begins with 5 i pads, the first row with none."""
    ids, mask = tokens(batch, length, seed), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        ids[row, : 5 * row], mask[row, : 5 * row] = 0, 0
    return ids, mask


def inputs_for(mask: torch.Tensor | None, start: int, end: int) -> dict[str, torch.Tensor]:
    """The mask over the columns so far and real positions, as `generate` prepares them; nothing without a mask."""
    if mask is None:
        return {}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}


def feed(model, cache, ids, chunks, mask=None):
    """Logits `[batch, length, vocabulary]` of a text fed in chunks of these lengths; the last repeats to the end."""
    out, start, chunks = [], 0, list(chunks)
    while start < ids.shape[1]:
        end = min(start + (chunks.pop(0) if len(chunks) > 1 else chunks[0]), ids.shape[1])
        kwargs = inputs_for(mask, start, end)
        out.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **kwargs).logits)
        start = end
    return torch.cat(out, dim=1)


def real(logits, mask):
    """Logits at real tokens alone."""
    return logits.flatten(0, 1) if mask is None else logits[mask.bool()]
