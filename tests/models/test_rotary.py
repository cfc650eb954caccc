"""Planes turn as they do in the models themselves."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvcompress.core.errors import UnsupportedModelError
from kvcompress.core.retention import Retention
from kvcompress.models.rotary import Rotation
from tests.cache.cache_tools import tokens
from tests.cache.select.select_tools import furthest, uniform

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}
CONFIGS = {
    "llama": lambda rope: LlamaConfig(**SMALL, num_key_value_heads=2, rope_parameters=rope),
    "gpt_neox": lambda rope: GPTNeoXConfig(**SMALL, rope_parameters={**rope, "partial_rotary_factor": 0.5}),
    "qwen3": lambda rope: Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16, rope_parameters=rope),
}


def model_with(family: str, kind: str):
    torch.manual_seed(0)
    rope = {"rope_type": kind, "rope_theta": 1e4, **KINDS[kind]}
    return AutoModelForCausalLM.from_config(CONFIGS[family](rope)).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_angles_are_the_models_own(family, kind):
    model = model_with(family, kind)
    embedding = model.base_model.rotary_emb
    at = torch.tensor([[0, 1, 17, 100, 5000]])
    expected = embedding(torch.zeros(1), at)
    rotation = Rotation.of(model.config)
    for mine, theirs in zip(rotation.cos_sin(at), expected, strict=True):
        twice = torch.cat((mine, mine), -1) * embedding.attention_scaling
        torch.testing.assert_close(twice, theirs, atol=1e-6, rtol=0)
    assert bool(rotation.speeds) == (kind != "default")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["expected_attention", "leverage"])
def test_keys_are_chosen_where_the_embedding_is_scaled(score, kind):
    model = model_with("llama", kind)
    compressor = uniform(model, Retention(2, 6, 5, score))
    with compressor.attached(model), torch.inference_mode():
        distance, choices = furthest(model, compressor, tokens(2, 40), [25, *[1] * 15], prefill="exact")
    assert distance < 1e-5
    assert choices >= 2 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_turning_a_rotated_vector_moves_it_along_the_text(kind):
    model = model_with("llama", kind)
    vectors = torch.randn(1, 3, 5, 8)
    there, here = torch.tensor([[0, 9, 30, 31, 90]]), torch.tensor([[7, 9, 2, 60, 0]])
    rotated = [
        apply_rotary_pos_emb(vectors, vectors, *model.base_model.rotary_emb(vectors, at))[0] for at in (there, here)
    ]
    found = Rotation.of(model.config).turn(rotated[0], here - there)
    torch.testing.assert_close(found, rotated[1], atol=1e-5, rtol=1e-5)


def test_speeds_that_follow_the_length_of_the_text_are_not_known():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(
        UnsupportedModelError, match=r"of type default, linear, llama3, yarn, this model's is 'dynamic'"
    ):
        Rotation.of(LlamaConfig(**SMALL, rope_parameters=rope))
