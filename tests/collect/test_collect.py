"""Collected statistics against the slow reference, on real architectures and on heads built by hand."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompress.analysis.classification import classify_heads
from kvcompress.collect import observer
from kvcompress.collect.collect import collect_attention
from kvcompress.collect.induction import induction_scores
from kvcompress.collect.observer import MASKED, NAME, observing, require_observable
from kvcompress.collect.params import StatisticsParams
from kvcompress.collect.statistics import compute_statistics
from kvcompress.collect.sums import DISTANCES, AttentionSums, add_heads, count_queries, empty_layer
from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.core.head_classes import HeadType
from kvcompress.core.head_statistics import HeadStatistics
from kvcompress.models.architecture import Architecture
from tests.reference.slow_statistics import attention_maps, slow_statistics
from tests.tiny import VOCABULARY, tiny_model

MEASURE = StatisticsParams(sink_size=3, local_window=9, recent_ratio=0.17)
SCALARS = ("mean_entropy", "std_entropy", "normalized_entropy", "uniformity_score", "max_attention_mean")


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def add_block(sums: dict, log_weights: torch.Tensor, weights: torch.Tensor, first: int) -> None:
    """A block of queries of all heads, which see all keys before them."""
    visible = torch.arange(first, first + weights.shape[1]) + 1
    count_queries(sums, visible)
    add_heads(sums, log_weights, weights, first, visible)


def assert_same(statistics: list[HeadStatistics], expected: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    for head in statistics:
        place = (head.layer_idx, head.head_idx)
        for name in SCALARS:
            assert getattr(head, name) == pytest.approx(expected[name][place], abs=tolerance), (place, name)
        for region, share in head.position_preference.items():
            assert share == pytest.approx(expected[region][place], abs=tolerance), (place, region)
        relative, without = expected["relative"][place], expected["without"][place]
        bins = [(64, 128), (128, 256), (256, 512), (512, 1024), (1024, 4096)]
        np.testing.assert_allclose(head.relative_position_dist, relative[:64], atol=tolerance)
        np.testing.assert_allclose(head.relative_without_sinks, without[:64], atol=tolerance)
        tails = [(head.relative_position_tail, relative), (head.tail_without_sinks, without)]
        for found, values in tails:
            np.testing.assert_allclose(found, [values[a:b].sum() for a, b in bins], atol=tolerance)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "qwen3", "gpt2", "phi"])
def test_equals_slow_reference_for_any_chunking(name: str) -> None:
    model, text = tiny_model(name), tokens(213)
    expected = slow_statistics([attention_maps(model, text)], 3, 9, 17)
    for chunk in (16, 100, 213):
        assert_same(compute_statistics(collect_attention(model, [text], chunk, progress=False), MEASURE), expected)


@pytest.mark.parametrize("name", ["gpt_neox", "mistral"])
def test_heads_of_a_block_come_one_after_the_other_where_it_is_large(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny_model(name), tokens(150)
    together = collect_attention(model, [text], 64, progress=False)
    kv_heads, sizes = Architecture.of_config(model.config).num_key_value_heads, []
    monkeypatch.setitem(observer.BLOCK_LIMITS, "cpu", (2**10, 32))
    plain = observer.hide

    def noting(scores: torch.Tensor, first: int, window: int | None) -> None:
        sizes.append(len(scores))
        plain(scores, first, window)

    monkeypatch.setattr(observer, "hide", noting)
    apart = collect_attention(model, [text], 64, progress=False)
    assert min(sizes) == 4 // kv_heads  # the query heads of one KV head
    for key, tensor in together.tensors.items():
        torch.testing.assert_close(apart.tensors[key], tensor, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_sliding_window_and_softcap(name: str) -> None:
    model, text = tiny_model(name, "eager"), tokens(150)
    windows = (40, 40) if name == "mistral" else (40, None)
    expected = slow_statistics([attention_maps(model, text)], 3, 9, 17, windows)
    for chunk in (37, 150):
        assert_same(compute_statistics(collect_attention(model, [text], chunk, progress=False), MEASURE), expected)


def test_documents_of_different_length_add_up() -> None:
    model, texts = tiny_model("llama"), [tokens(180, 1), tokens(70, 2), tokens(131, 3)]
    expected = slow_statistics([attention_maps(model, text) for text in texts], 3, 9, 17)
    together = collect_attention(model, texts, 64, progress=False)
    assert_same(compute_statistics(together, MEASURE), expected)
    parts = [collect_attention(model, [text], 64, progress=False) for text in texts]
    added = parts[2] + parts[0] + parts[1]
    for name, tensor in together.tensors.items():
        times = 3 if name in ("induction", "probes") else 1  # every call adds one probe
        torch.testing.assert_close(times * tensor, added.tensors[name], rtol=1e-12, atol=1e-12)
    assert (added.documents, added.longest) == (3, 180)


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_induction_is_the_weight_on_what_followed_the_same_token(name: str) -> None:
    model = tiny_model(name)
    sums = collect_attention(model, [tokens(100)], progress=False)
    once = torch.randint(VOCABULARY, (128,), generator=torch.Generator().manual_seed(0))
    maps = attention_maps(model, once.repeat(2))
    expected = np.mean([maps[:, :, query, query - 127] for query in range(127, 256)], axis=0)
    found = [head.induction_score for head in compute_statistics(sums, MEASURE)]
    np.testing.assert_allclose(found, expected.reshape(-1), atol=1e-6)
    np.testing.assert_allclose(induction_scores(model, 2).reshape(-1), found, atol=1e-9)


def test_bfloat16_keeps_the_statistics() -> None:
    exact = compute_statistics(collect_attention(tiny_model("llama"), [tokens(200)], 64, progress=False), MEASURE)
    model = tiny_model("llama", dtype=torch.bfloat16)
    rounded = compute_statistics(collect_attention(model, [tokens(200)], 64, progress=False), MEASURE)
    for a, b in zip(exact, rounded, strict=True):
        assert a.sink_ratio == pytest.approx(b.sink_ratio, abs=0.02)
        assert a.mean_entropy == pytest.approx(b.mean_entropy, abs=0.1)


def test_long_text_reaches_the_tail() -> None:
    """Beyond DISTANCES the strided diagonals stop being padded; the tail takes the rest."""
    length = DISTANCES + 300
    weights = torch.rand(1, length, length, generator=torch.Generator().manual_seed(0)).tril()
    weights /= weights.sum(-1, keepdim=True)
    sums = empty_layer(1, torch.device("cpu"))
    for start in (0, 200, 600, 1000, 1030, 1060, 1087, 1090, 1200):
        stop = min([*(s for s in (200, 600, 1000, 1030, 1060, 1087, 1090, 1200) if s > start), length])
        block = weights[:, start:stop, :stop].contiguous()
        add_block(sums, block.clamp_min(1e-30).log(), block, start)
    query, key = np.indices((length, length))
    distance = (query - key)[np.tril_indices(length)]
    expected = np.bincount(distance, weights[0].double().numpy()[np.tril_indices(length)])
    np.testing.assert_allclose(sums["relative"][0], expected[:DISTANCES], atol=1e-4)
    np.testing.assert_allclose(sums["relative_tail"], expected[DISTANCES:].sum(), atol=1e-3)
    near_sink = (query - key < DISTANCES) & (key < 64) & (query >= key)
    expected = np.bincount((query - key)[near_sink], weights[0].double().numpy()[near_sink], DISTANCES)
    np.testing.assert_allclose(sums["relative_sinks"][0], expected, atol=1e-4)


def built_heads(length: int) -> torch.Tensor:
    """`[head, query, key]`: pure sink, pure local, previous token, uniform, every other key."""
    position = torch.arange(length)
    distance = position[:, None] - position[None]
    causal = distance >= 0
    masks = [
        causal & (position < 4)[None],
        causal & (distance < 2),
        (distance == 1) | ((distance == 0) & (position[:, None] == 0)),
        causal,
        causal & (distance % 2 == 0),
    ]
    stacked = torch.stack(masks).float()
    return stacked / stacked.sum(-1, keepdim=True)


def test_heads_built_by_hand_classify_as_built() -> None:
    length = 600
    weights = built_heads(length)
    logarithm = torch.where(weights > 0, weights.log(), torch.tensor(MASKED))
    layer = empty_layer(len(weights), weights.device)
    add_block(layer, logarithm, weights, 0)
    statistics = compute_statistics(AttentionSums.stack([layer], length), StatisticsParams())
    sink, local, previous, uniform, every_other = statistics
    assert uniform.mean_entropy == pytest.approx(np.log(np.arange(1, length + 1)).mean(), abs=1e-5)
    assert uniform.normalized_entropy == pytest.approx(1, abs=1e-6)
    assert uniform.uniformity_score == pytest.approx(0, abs=1e-5)
    assert sink.sink_ratio == pytest.approx(1, abs=1e-6)
    assert local.local_ratio > 0.99
    assert previous.relative_position_dist[1] == pytest.approx(1 - 1 / length, abs=1e-6)
    assert every_other.mean_entropy > 3
    assert [head.head_type for head in classify_heads(statistics)] == [
        HeadType.SINK_POSITIONAL,
        HeadType.TRUE_POSITIONAL,
        HeadType.TRUE_POSITIONAL,
        HeadType.DEAD,
        HeadType.GATHERING,
    ]
    first_pass = [head.head_type for head in classify_heads(statistics, refined=False)]
    assert first_pass == [HeadType.POSITIONAL] * 3 + [HeadType.DEAD, HeadType.GATHERING]


def test_own_attention_returns_also_after_an_error() -> None:
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match="on purpose"), observing(model):
        assert model.config._attn_implementation == NAME
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == "sdpa"


def test_observed_attention_outside_is_refused() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(NAME)
    with pytest.raises(UnsupportedModelError, match="only inside"):
        model(tokens(8)[None])


def test_a_model_with_another_term_is_found_out() -> None:
    """A model whose own attention is not plain softmax attention must be refused, whatever the reason."""
    model = tiny_model("llama", "eager")
    honest = require_observable(model)
    assert honest.num_key_value_heads == 2
    original = type(model.model.layers[0].self_attn).forward

    def biased(self, *args, **kwargs):  # what a learned bias would do to the model's own attention
        output, weights = original(self, *args, **kwargs)
        return (output if self.config._attn_implementation == NAME else output + 0.5), weights

    for layer in model.model.layers:
        layer.self_attn.forward = biased.__get__(layer.self_attn)
    with pytest.raises(UnsupportedModelError, match="cannot be observed"):
        require_observable(model)


def test_documents_the_model_cannot_read_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="600 tokens exceeds the model's context of 512"):
        collect_attention(model, [tokens(600)], progress=False)
    with pytest.raises(InputError, match="no documents"):
        collect_attention(model, [], progress=False)
    with pytest.raises(InputError, match="chunk_size is 0"):
        collect_attention(model, [tokens(60)], 0, progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gpt2"])
def test_cuda_gives_the_same(name: str) -> None:
    text = tokens(213)
    expected = slow_statistics([attention_maps(tiny_model(name), text)], 3, 9, 17)
    for chunk in (64, 213):
        sums = collect_attention(tiny_model(name).cuda(), [text], chunk, progress=False)
        assert_same(compute_statistics(sums, MEASURE), expected)


def test_a_window_that_only_the_mask_knows_is_refused() -> None:
    """Such a model hides keys without telling its attention; the observer would look through the mask."""
    model = tiny_model("mistral")
    for layer in model.model.layers:
        original = type(layer.self_attn).forward

        def silent(self, *args, original=original, **kwargs):
            window, self.config.sliding_window = self.config.sliding_window, None
            try:
                return original(self, *args, **kwargs)
            finally:
                self.config.sliding_window = window

        layer.self_attn.forward = silent.__get__(layer.self_attn)
    with pytest.raises(UnsupportedModelError, match="has a sliding window of 40 by its config, but passes None"):
        require_observable(model)


def test_a_model_in_training_mode_or_with_damaged_weights_is_named() -> None:
    model = tiny_model("gpt2").train()
    with pytest.raises(UnsupportedModelError, match="training mode"):
        require_observable(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match="not finite"):
        require_observable(model.eval())


def test_rotation_that_depends_on_length_is_fed_whole() -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.config.max_position_embeddings = 512  # the context that scaling reaches
    whole, chunks = (collect_attention(model, [tokens(200)], size, progress=False) for size in (200, 32))
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(tensor, chunks.tensors[name])
