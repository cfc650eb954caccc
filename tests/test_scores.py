"""Scores of keys against slow, obvious twins in float64, on prompts, streams with holes, padded rows and long blocks."""

import pytest
import torch

from kvcompress.scores import SCORES, make_score
from tests.held_keys import CASES
from tests.slow_scores import Slow

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
    ("accumulated_attention", {"per_query": False}),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=str)
def test_score_is_its_definition(name: str, parameters: dict, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("attention", "non_causal"):  # so that a prompt takes several blocks
        monkeypatch.setattr(f"kvcompress.scores.{module}.block_size", lambda weights, device: 6)
    held, score = CASES[case](), make_score(name, **parameters)
    found, expected = score(held), Slow(held).answer(name, score)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
