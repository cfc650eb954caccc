"""Standard errors over documents against the formula document by document, and when collecting stops early."""

import numpy as np
import pytest
import torch

from kvcompress.collect.collect import collect_attention
from kvcompress.collect.params import CollectParams, StatisticsParams
from kvcompress.collect.standard_errors import FEWEST, precise_enough, standard_errors
from kvcompress.collect.statistics import compute_statistics
from kvcompress.collect.sums import AttentionSums
from tests.tiny import VOCABULARY, tiny_model

SINKS = 3


@pytest.fixture(scope="module")
def documents() -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (20 + 7 * i,), generator=make) for i in range(11)]


@pytest.fixture(scope="module")
def alone(documents: list[torch.Tensor]) -> list[AttentionSums]:
    """Each document by itself."""
    return [collect_attention(tiny_model("llama"), [tokens], progress=False) for tokens in documents]


def slow_error(totals: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`totals` `[document, layer, head]`: the standard error of their sum divided by that of the lengths."""
    mean = totals.sum(0) / lengths.sum()
    left = totals - mean * lengths[:, None, None]
    return np.sqrt(len(lengths) / (len(lengths) - 1) * (left**2).sum(0)) / lengths.sum()


def test_standard_errors_are_those_of_single_documents(
    documents: list[torch.Tensor], alone: list[AttentionSums]
) -> None:
    lengths = np.array([len(tokens) for tokens in documents])
    together = collect_attention(tiny_model("llama"), documents, 16, progress=False)
    expected = slow_error(np.stack([one.tensors["entropy"].numpy() for one in alone]), lengths)
    sinks = slow_error(np.stack([one.tensors["sinks"][..., :SINKS].sum(-1).numpy() for one in alone]), lengths)
    found = standard_errors(together)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
    np.testing.assert_allclose(found[1][..., SINKS - 1], sinks, rtol=1e-4)
    heads = compute_statistics(together, StatisticsParams(sink_size=SINKS))
    np.testing.assert_allclose([head.entropy_error for head in heads], expected.reshape(-1), rtol=1e-4)
    np.testing.assert_allclose([head.sink_error for head in heads], sinks.reshape(-1), rtol=1e-4)


def test_one_document_has_no_standard_error(alone: list[AttentionSums]) -> None:
    assert np.isinf(standard_errors(alone[-1])[0]).all()
    assert compute_statistics(alone[-1], StatisticsParams())[0].entropy_error is None


def test_an_error_says_how_far_other_samples_lie() -> None:
    """Means of many samples of documents spread as much as the errors of each say."""
    make = np.random.default_rng(0)

    def sample() -> AttentionSums:
        total = AttentionSums.none(1, 1)
        for _ in range(20):
            layer = {name: tensor[0] for name, tensor in AttentionSums.none(1, 1).tensors.items()}
            queries = int(make.integers(10, 30))
            layer["queries"] += queries
            layer["entropy"] += queries * make.normal(2, 0.5)
            total += AttentionSums.stack([layer], queries)
        return total

    samples = [sample() for _ in range(60)]
    means = [float(one.tensors["entropy"] / one.tensors["queries"]) for one in samples]
    errors = [standard_errors(one)[0].item() for one in samples]
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.2)


def test_collecting_stops_once_precise(documents: list[torch.Tensor], alone: list[AttentionSums]) -> None:
    many = [*documents, *documents]
    errors = []  # after each document: the largest entropy error, and the largest sink error
    total = alone[0]
    for one in [*alone[1:], *alone]:
        total += one
        errors.append([float(found.max()) for found in standard_errors(total)])
    for i, name in enumerate(("stop_entropy_error", "stop_sink_error")):
        bound = errors[12][i]  # of 14 documents
        params = CollectParams(stop_every=3, **{name: bound * 1.0001})
        expected = next(n for n in range(3, 23, 3) if n >= FEWEST and errors[n - 2][i] <= bound * 1.0001)
        found = collect_attention(tiny_model("llama"), many, progress=False, stopping=params)
        assert found.documents == expected < len(many)
    never = CollectParams(stop_every=3, stop_entropy_error=1e-9)
    assert collect_attention(tiny_model("llama"), many, progress=False, stopping=never).documents == len(many)
    assert not precise_enough(total, CollectParams())
    both = CollectParams(stop_entropy_error=1e3, stop_sink_error=1e-9)
    assert not precise_enough(total, both)
    assert precise_enough(total, CollectParams(stop_entropy_error=1e3))
    assert not precise_enough(alone[0] + alone[1], CollectParams(stop_entropy_error=1e3))  # too few
