"""Scores of keys against slow, obvious definitions in float64."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kvcompress.scores import attention_received, compactor
from kvcompress.scores.registry import SCORES, make_score
from kvcompress.scores.topk import best
from tests.reference.slow_scores import Slow
from tests.scores.cases import CASES, VARIANTS


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=str)
def test_score_is_its_definition(name: str, parameters: dict, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_received.BLOCK_LIMITS, "cpu", 1)  # so that a prompt takes several blocks
    inputs, score = CASES[case](), make_score(name, **parameters)
    found, expected = score(inputs), Slow(inputs).answer(name, score)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parameters", [{}, {"chunk": 7}, {"chunk": 16, "scale": None}], ids=str)
def test_leverage_of_many_queries_is_its_definition_too(
    parameters: dict, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compactor, "FEW", 0)
    monkeypatch.setitem(attention_received.BLOCK_LIMITS, "cpu", 1)
    inputs, score = CASES[case](), make_score("leverage", **parameters)
    assert torch.allclose(score(inputs).double(), Slow(inputs).answer("leverage", score), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ranks_as_float32_does(name: str, dtype: torch.dtype) -> None:
    """Of numbers that half precision holds, nearly all of the best third are the same keys in both precisions."""
    inputs = CASES["whole text"]()
    rounded = {field: getattr(inputs, field).to(dtype) for field in ("keys", "values", "queries")}
    half, whole = replace(inputs, **rounded), replace(inputs, **{field: rounded[field].float() for field in rounded})
    keys = 10
    taken = [best(make_score(name)(one), keys, inputs.stays).flatten(0, 1).tolist() for one in (half, whole)]
    same = [len(set(one) & set(other)) for one, other in zip(*taken, strict=True)]
    assert min(same) >= keys - 1, same
    assert sum(same) >= keys * len(same) - 2, same


@pytest.mark.parametrize("name", SCORES)
def test_large_keys_do_not_overflow_in_float16(name: str) -> None:
    inputs = CASES["whole text"]()
    assert inputs.queries is not None
    large = replace(
        inputs, keys=(inputs.keys * 300).half(), queries=(inputs.queries * 300).half(), values=inputs.values.half()
    )
    scores = make_score(name)(large)
    assert torch.isfinite(scores[large.candidates]).all()


def test_totals_at_hand_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, score = CASES["stream, sinks and window stay"](), make_score("accumulated_attention")
    expected, totals = score(inputs), score.received(inputs)
    monkeypatch.delattr(attention_received, "weight_blocks")
    assert torch.equal(score(inputs, totals), expected)


def test_names_are_known_without_torch() -> None:
    command = "import sys, kvcompress.sensitivity.params; assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True, env={"PYTHONPATH": "pipeline"})
