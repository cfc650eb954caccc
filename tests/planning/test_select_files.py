"""Strategy select in plans, classification files, joins, summaries and what shows them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvcompress.analysis.validation_report import retention_word
from kvcompress.cli.main import app
from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import HeadClassification, HeadType, load_classifications, save_classifications
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention, intersection, union
from kvcompress.methods import HeadAwareCompressor, HeadCompressionConfig, head_aware_compress
from kvcompress.reporting.head_map import slots_text
from kvcompress.scores.selection_rule import SelectionRule
from tests.cache.cache_tools import feed, model_of, tokens
from tests.project.project import ROOT

SELECT = Retention(4, 8, 20, "key_diff")
sizes = st.integers(0, 6), st.integers(1, 12)
wishes = st.lists(
    st.one_of(
        st.just(FULL),
        st.just(PRUNED),
        st.builds(Retention, *sizes, st.just(0), st.just("")),
        st.builds(Retention, *sizes, st.integers(1, 9), st.just("snapkv")),
    ),
    min_size=1,
    max_size=4,
)


@given(wishes, st.integers(0, 40))
def test_what_is_certain_of_a_head_that_selects(found: list[Retention], seen: int) -> None:
    for kept in found:
        certain = kept.positions(seen)
        assert certain == [key for key in range(seen) if kept.sees(seen - 1, key)]
        assert len(certain) <= kept.held(seen) == (seen if kept.unbounded else min(seen, kept.capacity))
        assert Retention.from_row(**kept.to_row()) == kept


@given(wishes, st.integers(0, 25), st.integers(0, 25))
def test_joins_hold_all_and_no_more_than_all_allow(found: list[Retention], query: int, key: int) -> None:
    largest, smallest = union(found), intersection(found)
    for wish in found:
        assert not wish.sees(query, key) or largest.sees(query, key)
        assert not smallest.sees(query, key) or wish.sees(query, key)
        assert largest.unbounded or largest.chosen >= wish.chosen
        assert wish.unbounded or smallest.chosen <= wish.chosen


def test_wishes_for_different_scores_cannot_be_joined() -> None:
    other = Retention(4, 8, 20, "snapkv")
    for join in (union, intersection):
        with pytest.raises(InputError, match="select by key_diff and snapkv, expected one score"):
            join([SELECT, other])
    assert union([SELECT, other, FULL]) == FULL
    assert intersection([SELECT, other, Retention(4, 9)]) == Retention(4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "select", "select_size": 5}, "select_size is 5 with score ''"),
        ({"strategy": "select", "select_size": -1}, "select_size is -1"),
        ({"strategy": "select", "select_size": 5, "score": "snapkv", "window_size": 0}, "window_size is 0"),
        ({"strategy": "sink_window", "select_size": 5}, "belong to strategy 'select', found 'sink_window'"),
        ({"strategy": "full", "score": "snapkv"}, "belong to strategy 'select', found 'full'"),
    ],
)
def test_impossible_configs(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        HeadCompressionConfig(**{"layer_idx": 0, "head_idx": 0, **changes})


def test_a_plan_names_size_and_score_only_where_keys_are_chosen(tmp_path: Path) -> None:
    plan = RetentionPlan(((SELECT, Retention(4, 8), Retention(0, 6, 3, "snapkv")), (FULL, PRUNED, SELECT)), 6)
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    rows = json.loads(text)["heads"]
    assert rows[0] == {
        "layer": 0, "kv_head": 0, "strategy": "select", "sink_size": 4, "window_size": 8, "select_size": 20,
        "score": "key_diff",
    }  # fmt: skip
    assert rows[1] == {"layer": 0, "kv_head": 1, "strategy": "sink_window", "sink_size": 4, "window_size": 8}
    loaded = RetentionPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == text
    assert plan.nbytes(1000, 8, 4) == 2 * 4 * 8 * (32 + 12 + 9 + 1000 + 0 + 32)
    for edit, message in (({"score": "magic"}, "unknown score 'magic'"), ({"score": ""}, "score ''")):
        broken = json.loads(text)
        broken["heads"][0] |= edit
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=message):
            HeadAwareCompressor.from_plan(tmp_path / "broken.json")


def test_the_heads_of_published_plans_are_written_again_byte_by_byte(tmp_path: Path) -> None:
    files = sorted((ROOT / "reports/devices").glob("*/plans/*/*.json"))
    assert files
    for file in files:
        RetentionPlan.load(file).save(tmp_path / "plan.json")
        found, expected = ((path.read_text().partition('"heads": ')[2]) for path in (tmp_path / "plan.json", file))
        assert found == expected != ""


def classes(strategy: str, **more: object) -> list[dict]:
    rows = [{"layer_idx": i, "head_idx": j, "head_type": "mixed", "confidence": 0.5} for i in (0, 1) for j in range(6)]
    for row in rows[:2]:
        row |= {"head_type": "gathering", "compression_strategy": strategy, "keep_sinks": True, **more}
    return rows


def test_classification_files_may_ask_for_snapkv(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    content = {"classifications": classes("snapkv", recommended_window=8, select_size=20)}
    path.write_text(json.dumps(content))
    compressor = HeadAwareCompressor.from_classifications(path)
    assert compressor.retention[0][:3] == (Retention(4, 8, 20, "snapkv"),) * 2 + (FULL,)
    save_classifications(path, load_classifications(path).ordered)
    assert HeadAwareCompressor.from_classifications(path).retention == compressor.retention
    model = model_of("llama")
    with compressor.attached(model):
        cache = compressor.new_cache(model.config)
        feed(model, cache, tokens(1, 50), [40, 1])
    assert cache.held()[0] == [32, 50, 50]
    path.write_text(
        json.dumps({"classifications": classes("select", recommended_window=8, select_size=9, score="key_diff")})
    )
    assert HeadAwareCompressor.from_classifications(path).retention[0][0] == Retention(4, 8, 9, "key_diff")
    path.write_text(json.dumps({"classifications": classes("sink_window", recommended_window=8, select_size=9)}))
    with pytest.raises(InputError, match="belong to strategy 'select'"):
        HeadAwareCompressor.from_classifications(path)


def test_a_head_that_does_not_select_is_written_as_before(tmp_path: Path) -> None:
    save_classifications(tmp_path / "classes.json", [HeadClassification(0, 0, HeadType.MIXED, 0.5)])
    assert "select" not in (tmp_path / "classes.json").read_text()
    assert "score" not in (tmp_path / "classes.json").read_text()


def test_uniform_compressors_and_their_summary() -> None:
    model, ids = model_of("llama"), tokens(1, 60)
    options = {"sink_size": 4, "window_size": 8, "select_size": 20, "selection_rule": SelectionRule(every=4)}
    compressor = HeadAwareCompressor.from_model_config(
        model.config, "select", score="key_diff", skip_layers=[1], **options
    )
    summary = compressor.get_compression_summary()
    assert summary["strategies"] == {"full": 3, "select": 3}
    assert summary["chosen_keys"] == 60
    assert summary["scores"] == {"key_diff": 3}
    assert summary["mean_bounded_slots"] == 32
    windows = HeadAwareCompressor.from_model_config(model.config, "sink_window", 4, 8)
    assert not {"chosen_keys", "scores"} & set(windows.get_compression_summary())
    with compressor.attached(model):
        cache = head_aware_compress(model(ids, use_cache=True).past_key_values, compressor=compressor)
        assert cache.held() == [[32] * 3, [60] * 3]
        feed(model, cache, tokens(1, 9), [9])
    assert "69 tokens seen, 32 to 69 held a head" in repr(cache)


def test_words_and_maps_know_chosen_keys(tmp_path: Path) -> None:
    assert retention_word(SELECT) == "4 + 8 + 20"
    assert slots_text(SELECT, 2048) == "32 (4 + 8 + 20 by key_diff)"
    RetentionPlan(((SELECT, FULL), (Retention(4, 8), PRUNED)), 4, "tiny").save(tmp_path / "plan.json")
    result = CliRunner().invoke(app, ["show", str(tmp_path / "plan.json"), "--context", "100"])
    assert result.exit_code == 0, result.output
    assert "slots held of 100" in result.output
    assert "32" in result.output
