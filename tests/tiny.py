"""Tiny random models and a byte-level tokenizer: real architectures, no network, a second of work."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 256
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
COMMON |= {"num_attention_heads": 4, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0}
COMMON |= {"pad_token_id": 0}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

CONFIGS = {
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON),
    "llama": lambda: LlamaConfig(**COMMON, **GROUPED),
    "qwen3": lambda: Qwen3Config(**COMMON, **GROUPED),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0
    ),
    "mistral": lambda: MistralConfig(**COMMON, **GROUPED, sliding_window=40),
    "gemma2": lambda: Gemma2Config(**COMMON, **GROUPED, sliding_window=40, query_pre_attn_scalar=8),
    "phi": lambda: PhiConfig(**COMMON),
}


def tiny_model(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose attention is peaked enough to have something to measure; the same for every call."""
    config = CONFIGS[name]()
    torch.manual_seed(7)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; id 0 is never produced by text and serves as padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_tiny(name: str, folder: Path) -> Path:
    """A model folder as a user would have it."""
    tiny_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prose(words: int, seed: int = 0) -> str:
    """Text without repeated passages: numbered nonsense, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 10**6, (words,), generator=generator).tolist()
    return "".join(f"word{number} " + ("\n" if i % 12 == 11 else "") for i, number in enumerate(numbers))
