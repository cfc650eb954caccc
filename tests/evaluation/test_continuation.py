"""Continuations after an exact prefill, and plans that select beside published scores at equal bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention
from kvcompress.evaluation.compare import compare_documents
from kvcompress.evaluation.contenders import Contender, plan_contenders
from kvcompress.evaluation.params import ComparePlansParams
from kvcompress.evaluation.perplexity import FULL_CACHE, score_contenders
from kvcompress.evaluation.prefill import read_prompt
from kvcompress.evaluation.results import ResultStore
from kvcompress.methods import (
    AdaptiveCompressor,
    Compressor,
    FixSizeL2Compressor,
    HeadAwareCompressor,
    StreamingLLMCompressor,
)
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule, kept_query_slots
from kvcompress.texts.retrieval_tasks import TASKS, make_cases
from tests.reference.oracle import judged
from tests.reference.recorded_selections import recorded_choices
from tests.tiny import prose, tiny_model, tiny_tokenizer

CONTEXT, LENGTH = 64, 96
CHOOSING = SelectionRule(every=8, observe=16)
PLANS = {
    "full": ((FULL,) * 2,) * 2,
    "window": ((Retention(4, 12),) * 2,) * 2,
    "select": ((Retention(2, 10, 4, "snapkv"), FULL), (PRUNED, Retention(4, 8, 8, "key_diff"))),
}


def documents() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {name: [torch.randint(1, 256, (LENGTH,), generator=generator)] for name in "ab"}


def plan_of(contenders: Mapping[str, Contender], name: str) -> RetentionPlan:
    plan = contenders[name].plan
    assert plan is not None
    return plan


def test_a_continuation_is_the_exact_prefill_masked_as_recorded() -> None:
    model, texts = tiny_model("llama"), documents()
    contenders = {
        name: HeadAwareCompressor.from_plan(RetentionPlan(kept, 4), selection_rule=CHOOSING)
        for name, kept in PLANS.items()
    }
    found = {
        size: score_contenders(model, texts, contenders, size, progress=False, context=CONTEXT)
        for size in (1, 16, LENGTH)
    }
    for name, kept in PLANS.items():
        for i, (text,) in enumerate(texts.values()):
            with torch.inference_mode():
                with contenders[name].attached(model):
                    cache = contenders[name].new_cache(model.config)
                    with recorded_choices(cache) as choices:
                        for part in text[None].split((CONTEXT, LENGTH - CONTEXT), 1):
                            model(part, past_key_values=cache)
                with judged(model, kept, "exact", CONTEXT, choices):
                    logits = model(text[None], use_cache=False).logits[0, CONTEXT:-1]
                full = model(text[None], use_cache=False).logits[0, CONTEXT:-1].log_softmax(-1)
            mine, targets = logits.log_softmax(-1), text[CONTEXT + 1 :]
            expected = -mine.gather(1, targets[:, None])[:, 0]
            kl = (full.exp() * (full - mine)).sum(-1)
            for scores in found.values():
                np.testing.assert_allclose(scores[name].nll[i], expected.numpy(), atol=1e-4)
                np.testing.assert_allclose(scores[name].kl[i], kl.numpy(), atol=1e-4)
                np.testing.assert_array_equal(scores[name].correct[i], (mine.argmax(-1) == targets).numpy())
    window = found[16]["window"]
    assert window.nbytes_mean == window.nbytes_end == 2 * 16 * 4 * 8 * 4  # K and V, slots, heads, head size, float32
    full = found[1]["full"]
    assert window.nbytes_end * CONTEXT / 16 <= full.nbytes_mean < full.nbytes_end


def test_methods_that_rank_keys_are_scored_on_continuations_too() -> None:
    contenders = {"l2": FixSizeL2Compressor(24, 0.5)}
    scores = score_contenders(tiny_model("llama"), documents(), contenders, 4, progress=False, context=CONTEXT)
    assert scores["l2"].nll.shape == (2, LENGTH - CONTEXT - 1)
    assert np.isfinite(scores["l2"].nll).all()


@pytest.mark.parametrize("context", [LENGTH - 1, -1])
def test_a_context_that_leaves_nothing_to_score(context: int) -> None:
    with pytest.raises(InputError, match=f"context is {context} tokens, expected 0 to {LENGTH - 2} of a document"):
        score_contenders(tiny_model("llama"), documents(), {}, context=context, progress=False)


@pytest.mark.parametrize("name", [*SCORES, "ada_kv", "windows", "positions in the cache", "l2", "full"])
def test_a_shared_prefill_fills_every_cache_as_its_own_would(name: str) -> None:
    """Bit for bit: what is held, and what follows."""
    model, prompt = tiny_model("llama"), documents()["a"][0]
    own: dict[str, Compressor] = {score: one_of(score) for score in SCORES}
    own |= {"ada_kv": AdaptiveCompressor(20, "snapkv", 2, 8), "windows": StreamingLLMCompressor(2, 10)}
    own |= {"positions in the cache": StreamingLLMCompressor(2, 10, "cache"), "l2": FixSizeL2Compressor(24, 0.5)}
    own |= {"full": HeadAwareCompressor.from_model_config(model.config, "full")}
    compressor = own[name]
    shared = read_prompt(model, prompt[:CONTEXT], own)[name]
    with torch.inference_mode(), compressor.attached(model):
        cache = compressor.new_cache(model.config)
        model(prompt[None, :CONTEXT], past_key_values=cache)
        assert shared.held() == cache.held()
        assert shared.held_nbytes == cache.held_nbytes
        for part in prompt[None, CONTEXT:].split((1, 5, 26), 1):
            assert torch.equal(model(part, past_key_values=shared).logits, model(part, past_key_values=cache).logits)
        assert shared.seen == cache.seen == LENGTH


def one_of(score: str) -> HeadAwareCompressor:
    plan = RetentionPlan(((Retention(2, 10, 8, score), FULL), (PRUNED, Retention(0, 30))), 4)
    return HeadAwareCompressor.from_plan(plan, selection_rule=CHOOSING)


def test_every_score_has_a_rival_of_the_same_bytes(tmp_path: Path) -> None:
    config = tiny_model("llama").config
    RetentionPlan.uniform(Retention(0, 32), 2, 2, 4, policy="mine").save(tmp_path / "mine-25.json")
    scores = (*SCORES, "adaptive snapkv")
    contenders = plan_contenders(config, 128, [tmp_path / "mine-25.json"], scores, [0.5, 0.25], CHOOSING)
    assert list(contenders)[:5] == [
        FULL_CACHE, "mine-25", "uniform = mine-25", "uniform = 50%", "select key_norm 50%"
    ]  # fmt: skip
    assert len(contenders) == 1 + 2 + 1 + 2 * len(scores)
    for name, one in contenders.items():
        if not one.family.startswith(("select", "adaptive")):
            continue
        assert one.rival == ("uniform = 50%" if "50%" in name else "uniform = mine-25")
        rival = contenders[one.rival].plan
        assert rival
        assert rival.held(128) == 4 * (64 if "50" in name else 32)
        if one.plan:
            assert one.plan.held(128) + kept_query_slots(one.plan, CHOOSING) == rival.held(128)
            assert one.plan.layers[1][1].score == one.family.split()[1] == name.split()[1]
            assert one.compressor.selection_rule == CHOOSING  # type: ignore[union-attr]
    assert plan_of(contenders, "select key_diff 25%").layers[0][0] == Retention(4, 14, 14, "key_diff")
    assert plan_of(contenders, "select leverage 25%").layers[0][0] == Retention(4, 6, 6, "leverage")
    for shares, message in (
        ([1.0], "expected more than 4 sinks"),
        ([0.03], "expected more than 4 sinks"),
        ([0.05], "room"),
    ):
        with pytest.raises(InputError, match=message):
            plan_contenders(config, 128, [], ["snapkv"], shares)
    with pytest.raises(InputError, match="scores has 'magic', expected key_norm, .* or 'adaptive ' before one"):
        plan_contenders(config, 128, [], ["magic"], [0.25])


def test_both_protocols_at_equal_bytes(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    RetentionPlan(PLANS["select"], 4, policy="mine").save(tmp_path / "mine.json")
    RetentionPlan(PLANS["window"], 4, policy="other").save(tmp_path / "other.json")
    contenders = plan_contenders(
        model.config,
        LENGTH,
        [tmp_path / "mine.json", tmp_path / "other.json"],
        ["key_norm", "adaptive snapkv"],
        [0.4],
        CHOOSING,
    )
    params = ComparePlansParams(max_tokens=LENGTH, chunk_size=16, plans=["mine", "other"], streaming=["mine"])
    cases = make_cases(tokenizer, {"a": prose(60, 7)}, [160], 1, 1)
    found = compare_documents(model, documents(), cases, contenders, params, params.streaming, CONTEXT)
    full, mine, rival = found["rows"]
    assert {row["protocol"] for row in found["rows"]} == {"streaming"}
    assert mine["rival"]["name"] == rival["name"] == "uniform = mine"
    slots = plan_of(contenders, "mine").held(LENGTH)
    asking = 4 * 16 * 8 * 4  # one layer keeps 16 queries of 4 heads of 8 float32
    assert mine["nbytes_end"] == slots * 2 * 8 * 4 + asking + 4 * (16 + 20)  # and where the keys of two heads lie
    assert rival["nbytes_end"] == slots * 2 * 8 * 4 + asking
    assert mine["kl"] > full["kl"] == 0
    assert mine["same_top"] < full["same_top"] == 1
    rows = {row["name"]: row for row in found["continuation"]}
    assert list(rows) == list(contenders)
    assert {row["protocol"] for row in rows.values()} == {"continuation"}
    even = rows["uniform = 40%"]
    assert even["nbytes_mean"] == even["nbytes_end"] == 2 * 38 * 4 * 8 * 4
    for row in rows.values():
        assert row["tokens"] == 2 * (LENGTH - CONTEXT - 1)
        assert set(row["retrieval"]) == set(TASKS)
        if "rival" not in row:
            continue
        ratio = row["perplexity_gmean"] / rows[row["rival"]["name"]]["perplexity_gmean"]
        assert row["rival"]["gmean_ratio"] == pytest.approx(ratio, abs=1e-4)
        assert row["nll_over"][row["rival"]["name"]] == row["rival"]["nll_over_rival"]
    assert set(rows["select key_norm 40%"]["nll_over"]) == {"uniform = 40%", "adaptive snapkv 40%"}
    over, back = (
        rows["select key_norm 40%"]["nll_over"]["adaptive snapkv 40%"],
        rows["adaptive snapkv 40%"]["nll_over"]["select key_norm 40%"],
    )
    assert over["mean"] == pytest.approx(-back["mean"], abs=1e-5)
    ((kind, counts),) = rows["mine"]["retrieval"]["needle"]["kinds"].items()
    assert "{who}" in kind
    assert counts == {name: rows["mine"]["retrieval"]["needle"][name] for name in ("correct", "total")}


def test_only_what_changed_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results from the store are those of a fresh run; a new plan costs its own passes and the full cache's."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    params = ComparePlansParams(max_tokens=LENGTH, chunk_size=16)
    cases = make_cases(tokenizer, {"a": prose(60, 7)}, [160], 1, 1)
    fed: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))

    def run(plan: str, store: ResultStore | None) -> tuple[int, dict]:
        RetentionPlan(PLANS[plan], 4, policy="mine").save(tmp_path / "mine.json")
        contenders = plan_contenders(model.config, LENGTH, [tmp_path / "mine.json"], ["snapkv"], [0.4])
        fed.clear()
        found = compare_documents(model, documents(), cases, contenders, params, ["mine"], CONTEXT, store)
        for row in [*found["rows"], *found["continuation"]]:
            del row["seconds"]
        return sum(fed), found

    def store(**origin: str) -> ResultStore:
        return ResultStore(tmp_path / "results", **origin)

    (everything, window), (_, select) = run("window", None), run("select", None)
    assert run("window", store()) == (everything, window)
    assert run("window", store()) == (0, window)
    some, found = run("select", store())
    assert found == select
    assert 0 < some < everything
    assert run("select", store()) == (0, select)
    assert run("select", store(model="other")) == (everything, select)
    monkeypatch.setattr("kvcompress.evaluation.results.code_version", lambda: "other")
    assert run("select", store()) == (everything, select)
    hook.remove()


def test_an_interrupted_run_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = tiny_model("llama"), ResultStore(tmp_path)
    contenders = {name: HeadAwareCompressor.from_plan(RetentionPlan(kept, 4)) for name, kept in PLANS.items()}
    kept, put = [], ResultStore.put

    def fail(self: ResultStore, *given: Any) -> None:
        if len(kept) == 4:
            raise KeyboardInterrupt
        kept.append(given)
        put(self, *given)

    monkeypatch.setattr(ResultStore, "put", fail)
    with pytest.raises(KeyboardInterrupt):
        score_contenders(model, documents(), contenders, 16, progress=False, store=store)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(ResultStore, "put", put)
    resumed = score_contenders(model, documents(), contenders, 16, progress=False, store=store)
    fresh = score_contenders(model, documents(), contenders, 16, progress=False)
    for name, score in fresh.items():
        np.testing.assert_array_equal(resumed[name].kl, score.kl)
        np.testing.assert_array_equal(resumed[name].nll, score.nll)
        np.testing.assert_array_equal(resumed[name].held, score.held)
