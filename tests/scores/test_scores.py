"""Scores of keys against slow, obvious twins in float64, on prompts, streams with holes, padded rows and long blocks."""

from dataclasses import replace

import pytest
import torch

from kvcompress.scores.registry import SCORES, make_score
from kvcompress.scores.topk import best
from tests.cache.held_keys import CASES
from tests.reference.slow_scores import Slow

# Every score with its defaults, and with each parameter elsewhere.
VARIANTS = [
    *((name, {}) for name in SCORES),
    ("snapkv", {"window": 5, "kernel": 7, "pooling": "max"}),
    ("snapkv", {"window": 9, "kernel": 1}),
    ("expected_attention", {"future": 20, "skip": 0, "epsilon": 0.02}),
    ("expected_attention", {"covariance": False, "value_norm": False, "skip": 1000}),
    ("expected_attention", {"most": 9}),
    ("leverage", {"sketch": 6, "chunk": 16, "seed": 3, "scale": None}),
    ("leverage", {"unrotate": False, "chunk": 7, "kernel": 5, "ridge": 1.0, "blend": 2.0}),
    ("accumulated_attention", {"per_query": False, "most": None}),
    ("accumulated_attention", {"most": 9}),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=str)
def test_score_is_its_definition(name: str, parameters: dict, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("attention_received", "chunk_attention"):  # so that a prompt takes several blocks
        monkeypatch.setattr(f"kvcompress.scores.{module}.block_size", lambda weights, device: 6)
    held, score = CASES[case](), make_score(name, **parameters)
    found, expected = score(held), Slow(held).answer(name, score)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parameters", [{}, {"chunk": 7}, {"chunk": 16, "scale": None}], ids=str)
def test_leverage_of_many_queries_is_its_definition_too(
    parameters: dict, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcompress.scores.chunk_attention.FEW", 0)
    monkeypatch.setattr("kvcompress.scores.chunk_attention.block_size", lambda weights, device: 6)
    held, score = CASES[case](), make_score("leverage", **parameters)
    assert torch.allclose(score(held).double(), Slow(held).answer("leverage", score), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ranks_as_float32_does(name: str, dtype: torch.dtype) -> None:
    """The same numbers, which half precision holds, in both: nearly all of the best third are the same keys."""
    held = CASES["whole text"]()
    rounded = {field: getattr(held, field).to(dtype) for field in ("keys", "values", "queries")}
    half, whole = replace(held, **rounded), replace(held, **{field: rounded[field].float() for field in rounded})
    keys = 10
    chosen = [best(make_score(name)(one), keys, held.stays).flatten(0, 1).tolist() for one in (half, whole)]
    same = [len(set(one) & set(other)) for one, other in zip(*chosen, strict=True)]
    assert min(same) >= keys - 1, same
    assert sum(same) >= keys * len(same) - 2, same


@pytest.mark.parametrize("name", SCORES)
def test_large_keys_do_not_overflow_in_float16(name: str) -> None:
    held = CASES["whole text"]()
    large = replace(held, keys=(held.keys * 300).half(), queries=(held.queries * 300).half(), values=held.values.half())
    scores = make_score(name)(large)
    assert torch.isfinite(scores[large.candidates]).all()
