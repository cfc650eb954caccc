"""Scoring through the real cache against one masked pass of the oracle, and the bytes that go with it."""

import numpy as np
import pytest
import torch

from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention
from kvcompress.evaluation.perplexity import QualityResult, Reference, score_contenders, score_document
from kvcompress.methods import FixSizeL2Compressor, HeadAwareCompressor
from tests.reference.oracle import judged
from tests.tiny import VOCABULARY, tiny_model

PLANS = {
    "uniform": [[Retention(4, 12)] * 2] * 2,
    "mixed": [[Retention(2, 7), FULL], [PRUNED, Retention(0, 30)]],
    "full": [[FULL] * 2] * 2,
}


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def plan(name: str) -> RetentionPlan:
    return RetentionPlan(tuple(map(tuple, PLANS[name])), 4)


def nll_of(logits: torch.Tensor, text: torch.Tensor) -> np.ndarray:
    return -torch.log_softmax(logits.float(), -1)[:-1].gather(1, text[1:, None])[:, 0].double().numpy()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("prefill", ["streaming", "exact"])
def test_one_masked_pass_equals_the_real_cache(name: str, prefill: str) -> None:
    model, text, prompt = tiny_model("llama"), tokens(150), 64
    with torch.inference_mode(), judged(model, PLANS[name], prefill, prompt if prefill == "exact" else None):
        expected = nll_of(model(text[None], use_cache=False).logits[0], text)
    compressor = HeadAwareCompressor.from_plan(plan(name))
    with torch.inference_mode(), compressor.attached(model):
        for chunk in (prompt, 1) if prefill == "streaming" else (prompt,):
            found, _ = score_document(model, text, compressor.new_cache(model.config, prefill=prefill), chunk)
            np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_the_full_cache_scores_as_the_model_does() -> None:
    model, documents = tiny_model("llama"), {"a": [tokens(100, 1), tokens(100, 2)], "b": [tokens(100, 3)]}
    contenders = {name: HeadAwareCompressor.from_plan(plan(name)) for name in PLANS}
    scores = score_contenders(model, documents, contenders, chunk_size=30, progress=False)
    full = scores["full"]
    assert full.texts == ["a", "a", "b"]
    for i, text in enumerate([*documents["a"], *documents["b"]]):
        with torch.inference_mode():
            logits = model(text[None], use_cache=False).logits[0]
        np.testing.assert_allclose(full.nll[i], nll_of(logits, text), atol=1e-4)
        np.testing.assert_array_equal(full.correct[i], (logits[:-1].argmax(-1) == text[1:]).numpy())
    assert (full.kl == 0).all()
    assert (full.same_top == 1).all()
    assert (scores["uniform"].same_top[:, :15] == 1).all()
    assert scores["uniform"].same_top.mean() < 1
    assert scores["uniform"].kl.mean() > 1e-3
    assert (scores["uniform"].kl[:, :15] < 1e-5).all()  # nothing is forgotten before slot 16 is needed
    assert scores["uniform"].nbytes_end == plan("uniform").nbytes(100, head_dim=8, itemsize=4)
    assert full.nbytes_end >= plan("full").nbytes(100, head_dim=8, itemsize=4)
    assert full.nbytes_peak >= full.nbytes_end >= full.nbytes_mean


def test_kl_is_that_of_the_distributions() -> None:
    model, text = tiny_model("llama"), tokens(60)
    compressor, reference = HeadAwareCompressor.from_plan(plan("uniform")), Reference(59)
    with torch.inference_mode(), compressor.attached(model):
        full = model(text[None], use_cache=False).logits[0].log_softmax(-1)[:-1]
        reference.record(0, full[:20], full[:20].argmax(-1))
        reference.record(20, full[20:], full[20:].argmax(-1))
        logits = model(text[None], past_key_values=compressor.new_cache(model.config, "streaming")).logits[0, :-1]
        cache = compressor.new_cache(model.config, "streaming")
        found, _ = score_document(model, text, cache, 25, reference.compare)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), full.exp(), reduction="none").sum(-1)
    np.testing.assert_allclose(found[3], expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(found[2], (logits.argmax(-1) == full.argmax(-1)).numpy())


def test_methods_that_rank_keys_are_scored_too() -> None:
    contenders = {"l2": FixSizeL2Compressor(24, 0.5, skip_layers=())}
    score = score_contenders(tiny_model("llama"), {"a": [tokens(96)]}, contenders, 16, progress=False)["l2"]
    assert score.nll.shape == (1, 95)
    assert np.isfinite(score.nll).all()
    slot = 2 * 2 * 2 * 8 * 4  # layers x KV heads x (K, V) x head_dim x float32
    assert 24 * slot <= score.nbytes_end <= (24 + 16 + 15) * slot  # room for the next chunk stays allocated


def test_documents_must_have_one_length() -> None:
    with pytest.raises(InputError, match=r"found \[50, 60\] tokens"):
        score_contenders(tiny_model("llama"), {"a": [tokens(50), tokens(60)]}, {}, progress=False)


def test_means_by_text_and_from_a_place_on() -> None:
    nll = np.array([[1.0, 3.0], [2.0, 2.0], [4.0, 0.0]])
    held = np.array([[1.0, 2.0], [1.0, 3.0], [2.0, 5.0]])
    score = QualityResult(["a", "a", "b"], nll, nll > 2, nll, nll, held, 5, 0.0)
    assert (score.nbytes_end, score.nbytes_mean) == (5, 3.5)  # of the last document
    assert score.perplexity("b") == pytest.approx(np.exp(2))
    assert score.perplexity(first=1) == pytest.approx(np.exp(5 / 3))
    assert score.mean("correct", "a") == 0.25
    assert score.geometric_mean() == pytest.approx(np.exp(2))


def test_past_the_context_there_is_no_reference() -> None:
    contenders = {"uniform": HeadAwareCompressor.from_plan(plan("uniform"))}
    (score,) = score_contenders(
        tiny_model("llama"), {"a": [tokens(96)]}, contenders, 16, progress=False, references=False
    ).values()
    assert np.isfinite(score.nll).all()
    assert np.isnan(score.kl).all()
    assert score.held.shape == (1, 6)
