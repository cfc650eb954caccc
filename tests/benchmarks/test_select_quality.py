"""Plans that select beside their rivals: continuations after an exact prefill, names and bytes, the whole program."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import select_quality
from benchmarks.select_contenders import select_contenders
from benchmarks.select_quality import app
from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention
from kvcompress.evaluation.compare import run_ablation
from kvcompress.evaluation.contenders import FULL_CACHE, UNIFORM, Contender, plan_contenders
from kvcompress.evaluation.params import ComparePlansParams
from kvcompress.evaluation.perplexity import score_continuation
from kvcompress.evaluation.retrieval import retrieve
from kvcompress.methods import FixSizeL2Compressor, HeadAwareCompressor
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule, kept_query_slots
from kvcompress.sensitivity.measure import measure_sensitivity
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.texts.retrieval_tasks import make_cases
from tests.reference.oracle import judged
from tests.reference.recorded import recorded_choices
from tests.tiny import prose, save_tiny, tiny_model, tiny_tokenizer

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
        name: HeadAwareCompressor.from_plan(RetentionPlan(kept, 4), choosing=CHOOSING) for name, kept in PLANS.items()
    }
    found = {
        size: score_continuation(model, texts, contenders, CONTEXT, size, progress=False) for size in (1, 16, LENGTH)
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
    scores = score_continuation(
        tiny_model("llama"), documents(), {"l2": FixSizeL2Compressor(24, 0.5)}, CONTEXT, 4, progress=False
    )
    assert scores["l2"].nll.shape == (2, LENGTH - CONTEXT - 1)
    assert np.isfinite(scores["l2"].nll).all()


@pytest.mark.parametrize("context", [LENGTH - 1, -1])
def test_a_context_that_leaves_nothing_to_score(context: int) -> None:
    with pytest.raises(InputError, match=f"context is {context} tokens, expected 0 to {LENGTH - 2} of a document"):
        score_continuation(tiny_model("llama"), documents(), {}, context, progress=False)


def test_every_score_has_a_plan_and_a_rival_of_the_same_bytes() -> None:
    model = tiny_model("llama")
    contenders = select_contenders(model.config, [0.5, 0.25], 128, recent=0.25, choosing=CHOOSING)
    assert list(contenders)[:3] == [FULL_CACHE, "uniform 50.00%", "select key_norm 50.00%"]
    assert len(contenders) == 1 + 2 * (1 + len(SCORES))
    for name, one in contenders.items():
        if name.startswith("select"):
            rival = contenders[one.rival or ""]
            assert one.plan
            assert rival.plan
            assert rival.plan.held(128) == 4 * (64 if "50" in name else 32)
            assert one.plan.held(128) + kept_query_slots(one.plan, CHOOSING) == rival.plan.held(128)
            assert one.compressor.choosing == CHOOSING  # type: ignore[attr-defined]
            assert name.split()[1] == one.plan.layers[1][1].score
    assert plan_of(contenders, "select key_diff 25.00%").layers[0][0] == Retention(4, 7, 21, "key_diff")
    assert plan_of(contenders, "select leverage 25.00%").layers[0][0] == Retention(4, 3, 9, "leverage")
    grown = select_contenders(model.config, [0.25], 128, scores=["key_diff"], more=10)
    assert plan_of(grown, "select key_diff 25.00%").layers[0][0] == Retention(4, 19, 19, "key_diff")
    own = select_contenders(model.config, [0.25], 128, scores=["key_diff"], windows=[2])
    assert list(own)[2:] == ["select key_diff 25.00%", "select key_diff 25.00%, window 2"]
    assert plan_of(own, "select key_diff 25.00%, window 2").layers[0][0] == Retention(4, 2, 26, "key_diff")
    with pytest.raises(InputError, match="room for a window of 28 and for keys"):
        select_contenders(model.config, [0.25], 128, scores=["key_diff"], windows=[28])
    for share in (1.0, 0.03):
        with pytest.raises(InputError, match="expected fewer than all tokens"):
            select_contenders(model.config, [share], 128)


def test_plan_files_with_choosing_heads_are_compared_at_equal_bytes(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    RetentionPlan(PLANS["select"], 4, policy="mine").save(tmp_path / "mine.json")
    contenders = plan_contenders(model.config, LENGTH, [tmp_path / "mine.json"])
    assert contenders["uniform = mine"].family == UNIFORM
    params = ComparePlansParams(max_tokens=LENGTH, chunk_size=32)
    cases = make_cases(tokenizer, {"a": prose(60, 7)}, [160], 1, 1)
    full, mine, rival = run_ablation(model, documents(), cases, contenders, params)
    assert mine["rival"]["name"] == rival["name"]
    slots = plan_of(contenders, "mine").held(LENGTH)
    asking = 4 * 16 * 8 * 4  # one layer keeps 16 queries of 4 heads of 8 float32
    assert mine["nbytes_end"] == slots * 2 * 8 * 4 + asking + 4 * (16 + 20)  # and where the keys of two heads lie
    assert rival["nbytes_end"] == slots * 2 * 8 * 4 + asking
    assert mine["kl"] > full["kl"]
    assert mine["perplexity"] != rival["perplexity"]


def test_the_program_compares_scores(tmp_path: Path) -> None:
    folder, corpus = save_tiny("llama", tmp_path / "model"), tmp_path / "corpus" / "evaluation"
    corpus.mkdir(parents=True)
    for seed in (1, 2):
        (corpus / f"text{seed}.txt").write_text(prose(80, seed))
    where = [
        "--model",
        str(folder),
        "--corpus",
        str(corpus.parent),
        "--device",
        "cpu",
        "--every",
        "8",
        "--observe",
        "4",
    ]
    sizes = ["--context", "96", "--continuation", "32", "--documents-per-text", "1", "--retrieval-length", "160"]
    flags = [*where, *sizes, "--retrieval-depths", "1", "--growing", "--score", "snapkv", "--score", "key_norm"]
    flags += ["--window", "3", "--adaptive", "snapkv"]
    model = tiny_model("llama")
    params = SensitivityParams(
        max_tokens=160, documents_per_text=1, windows=[8, 32], joint_windows=[16], fact_contexts=1, facts_per_context=1,
        far=16, nodes=1, choice_sizes=[128],
    )  # fmt: skip
    measure_sensitivity(model, tiny_tokenizer(), {"a": prose(80, 3)}, params, progress=False).save(tmp_path / "prices")
    flags += ["--sensitivity", str(tmp_path / "prices"), "--policy", "select", "--policy", "priced", "--task", "needle"]
    result = CliRunner().invoke(app, [*flags, "--output", str(tmp_path / "quality.json")])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        FULL_CACHE, "uniform 25.00%", "select snapkv 25.00%", "adaptive snapkv 25.00%", "select snapkv 25.00%, window 3",
        "adaptive snapkv 25.00%, window 3", "select key_norm 25.00%", "select key_norm 25.00%, window 3", "select 25.00%",
        "priced 25.00%",
    ]  # fmt: skip
    for row in rows[1:]:  # four bytes a slot say where its key lies, a sixteenth of these tiny slots
        assert 1 <= row["nbytes_end"] / rows[1]["nbytes_end"] <= 1 + 1 / 16, row["name"]
    assert rows[8]["rival"]["name"] == rows[9]["rival"]["name"] == "uniform 25.00%"
    assert rows[1]["nbytes_mean"] == 2 * 40 * 4 * 8 * 4  # a quarter of the context and half of the continuation
    assert rows[2]["rival"]["gmean_ratio"] == pytest.approx(
        rows[2]["perplexity_gmean"] / rows[1]["perplexity_gmean"], abs=1e-4
    )
    assert set(rows[2]["retrieval"]) == {"needle"}
    ((kind, counts),) = rows[2]["retrieval"]["needle"]["kinds"].items()
    assert "{who}" in kind
    assert counts == {name: rows[2]["retrieval"]["needle"][name] for name in ("correct", "total")}
    assert [set(row.get("nll_over", {})) for row in rows[:2]] == [set(), set()]
    for row in rows[2:]:
        assert set(row["nll_over"]) == {other["name"] for other in rows[1:]} - {row["name"]}
        assert row["nll_over"]["uniform 25.00%"] == row["rival"]["nll_over_rival"]
    assert rows[3]["nbytes_end"] == rows[2]["nbytes_end"]
    assert rows[3]["perplexity"] != rows[2]["perplexity"]
    over, back = rows[8]["nll_over"]["priced 25.00%"], rows[9]["nll_over"]["select 25.00%"]
    assert over["mean"] == pytest.approx(-back["mean"], abs=1e-5)
    assert "| select key_norm 25.00% |" in result.output
    some = [
        "--early",
        "1",
        "--early",
        "3",
        "--plans",
        str(tmp_path / "plans"),
        "--output",
        str(tmp_path / "early.json"),
    ]
    assert not CliRunner().invoke(app, [*flags, *some]).exception
    found = json.loads((tmp_path / "early.json").read_text())
    assert found["settings"]["early"] == [1, 3]
    for favour in (1, 3):
        named = f"select 25.00%, early {favour}"
        assert named in [row["name"] for row in found["rows"]]
        for use in ("text", "facts"):
            plan = RetentionPlan.load(tmp_path / "plans" / f"select-25.00-early-{favour}-{use}.json")
            assert plan.made_from["early"] == favour
            assert plan.held(128 if use == "text" else 160) <= 4 * 40
    failed = CliRunner().invoke(app, [*where, "--score", "magic"])
    assert failed.exit_code == 1
    assert "--score is 'magic', expected one of key_norm" in failed.output
    failed = CliRunner().invoke(app, [*where, "--task", "magic"])
    assert "--task is 'magic', expected one of passkey" in failed.output


def test_facts_stream_in_where_asked_to_and_another_seed_makes_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, corpus = save_tiny("llama", tmp_path / "model"), tmp_path / "corpus" / "evaluation"
    corpus.mkdir(parents=True)
    (corpus / "text.txt").write_text(prose(80, 1))
    heard = []

    def listened(model: Any, cases: Any, contenders: Any, prefill: str, chunk_size: int) -> Any:
        heard.append((prefill, [case.answer for case in cases]))
        return retrieve(model, cases, contenders, prefill, chunk_size, progress=False)  # type: ignore[arg-type]

    monkeypatch.setattr(select_quality, "retrieve", listened)
    flags = ["--model", str(folder), "--corpus", str(corpus.parent), "--device", "cpu", "--score", "key_norm"]
    flags += ["--context", "96", "--continuation", "32", "--documents-per-text", "1", "--retrieval-length", "160"]
    flags += ["--retrieval-depths", "2", "--task", "passkey", "--output", str(tmp_path / "quality.json")]
    for more in ([], ["--streaming", "--retrieval-seed", "5"]):
        result = CliRunner().invoke(app, [*flags, *more])
        assert result.exit_code == 0, result.output
    assert [prefill for prefill, _ in heard] == ["exact", "streaming"]
    assert heard[0][1] != heard[1][1]
    settings = json.loads((tmp_path / "quality.json").read_text())["settings"]
    assert (settings["retrieval_seed"], settings["retrieval_prefill"]) == (5, "streaming")
