"""A plan in one call, on a tiny model: the budget is met, and the plan does what it says in a real cache."""

from pathlib import Path

import pytest
import torch

from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.methods import HeadAwareCompressor
from kvcompress.planning import make_plan
from kvcompress.planning.budget import Budget
from kvcompress.sensitivity.measure import measure_sensitivity
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.prices import Sensitivity
from tests.tiny import prose, tiny_model, tiny_tokenizer

PARAMS = SensitivityParams(
    max_tokens=256, documents_per_text=1, windows=[4, 16, 64], joint_windows=[16], sinks=2, fact_contexts=1,
    facts_per_context=1, far=16, nodes=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> RetentionPlan:
    return make_plan(tiny_model("llama"), tiny_tokenizer(), prose(100, 3), 0.25, params=PARAMS)


def test_the_budget_is_met_at_the_documents_length(plan: RetentionPlan) -> None:
    assert plan.held(256) == 4 * 64
    assert plan.policy == "priced"
    assert plan.budget == {"share": 0.25, "context_length": 256}
    assert plan.made_from["texts"] == ["text 0"]


def test_the_cache_holds_what_the_plan_says(plan: RetentionPlan) -> None:
    model, compressor = tiny_model("llama"), HeadAwareCompressor.from_plan(plan)
    prompt = tiny_tokenizer()(prose(20, 9), return_tensors="pt").input_ids[:, :250]
    cache = compressor.new_cache(model.config)
    with compressor.attached(model), torch.inference_mode():
        model.generate(prompt, past_key_values=cache, max_new_tokens=7, min_new_tokens=7, do_sample=False)
    seen = prompt.shape[1] + 6  # the last token is never fed
    assert cache.get_seq_length() == seen
    assert cache.held() == [[kept.held(seen) for kept in layer] for layer in plan.layers]


@pytest.mark.parametrize("texts", [[prose(100, 3)], {"text 0": prose(100, 3)}])
def test_texts_may_be_a_list_or_named(texts: list[str] | dict[str, str], plan: RetentionPlan) -> None:
    assert make_plan(tiny_model("llama"), tiny_tokenizer(), texts, "25%", params=PARAMS) == plan


def test_one_measurement_serves_many_plans(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    measure_sensitivity(model, tokenizer, {"a": prose(100, 3)}, PARAMS, progress=False).save(tmp_path / "s")
    found = Sensitivity.load(tmp_path / "s")
    for budget in ("12.5%", Budget("tokens", 40), "8 KB"):
        plan = make_plan(model, tokenizer, (), budget, sensitivity=found, context_length=400)
        amount = Budget.parse(budget)
        assert plan.held(400) == amount.slots(4, 400, 2 * 8 * 4)
    uniform = make_plan(model, tokenizer, (), 0.5, "uniform", sensitivity=found)
    assert len({kept for layer in uniform.layers for kept in layer}) == 1


def test_invalid_requests_are_refused() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(InputError, match="'a quarter', expected a value such as"):
        make_plan(model, tokenizer, prose(100), "a quarter", params=PARAMS)
    with pytest.raises(InputError, match="documents of 256 tokens need 256"):
        make_plan(model, tokenizer, "too short", params=PARAMS)
