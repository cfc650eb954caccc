"""Retention: the three ways of saying it agree, and a plan file is checked line by line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention, intersection, join_query_heads, union
from kvcompress.methods import HeadCompressionConfig

retentions = st.one_of(
    st.just(FULL), st.just(PRUNED), st.builds(Retention, st.integers(0, 6), st.integers(1, 12), st.just(0), st.just(""))
)


@given(retentions, st.integers(0, 40))
def test_positions_held_are_what_the_last_query_saw(kept: Retention, seen: int) -> None:
    held = kept.positions(seen)
    assert held == [key for key in range(seen) if kept.sees(seen - 1, key)]
    assert len(held) == kept.held(seen)
    assert kept.capacity is None or len(held) <= kept.capacity


@given(retentions)
def test_rows_and_retention_say_the_same(kept: Retention) -> None:
    assert Retention.from_row(**kept.to_row()) == kept


@given(st.lists(retentions, min_size=1, max_size=4), st.integers(0, 25), st.integers(0, 25))
def test_union_contains_and_intersection_is_contained(heads: list[Retention], query: int, key: int) -> None:
    for kept in heads:
        assert not kept.sees(query, key) or union(heads).sees(query, key)
        assert not intersection(heads).sees(query, key) or kept.sees(query, key)


def test_join_takes_neighbouring_query_heads() -> None:
    heads = [Retention(4, 8), Retention(0, 16), PRUNED, PRUNED]
    assert join_query_heads(heads, 2) == [Retention(4, 16), PRUNED]
    with pytest.raises(InputError, match="4 query heads cannot be shared by 3"):
        join_query_heads(heads, 3)
    with pytest.raises(InputError, match="unknown rule 'mean'"):
        join_query_heads(heads, 2, "mean")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "magic"}, "unknown strategy 'magic'"),
        ({"sink_size": -1}, "sink_size is -1"),
        ({"strategy": "sink_window", "window_size": -2}, "window_size is -2"),
        ({"strategy": "window_only", "window_size": 0}, "window_size is 0"),
        ({"layer_idx": -1}, "counted from 0"),
    ],
)
def test_impossible_configs(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        HeadCompressionConfig(**{"layer_idx": 0, "head_idx": 0, **changes})


def test_the_published_word_for_undecided_is_full() -> None:
    assert HeadCompressionConfig(0, 0, "none").strategy == "full"
    assert HeadCompressionConfig(0, 0, "sink_window", keep_sinks=False).retention == Retention(0, 8)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, -7), "4 sinks with window -7"),
        ((-2, 5), "-2 sinks with window 5"),
        ((4, 0), "4 sinks with window 0"),
        ((4, 8, 5, ""), "5 chosen keys by score ''"),
        ((4, 8, 0, "snapkv"), "0 chosen keys by score 'snapkv'"),
        ((4, -1, 5, "snapkv"), "5 chosen keys by score 'snapkv' with window -1"),
        ((4, 8, -1, "snapkv"), "-1 chosen keys by score 'snapkv'"),
    ],
)
def test_numbers_that_contradict_each_other(numbers: tuple, message: str) -> None:
    with pytest.raises(InputError, match=f"invalid retention: {message}"):
        Retention(*numbers)


def plan() -> RetentionPlan:
    layers = ((Retention(4, 8), FULL), (PRUNED, Retention(0, 5)))
    return RetentionPlan(layers, 6, "tiny", "by hand", {"share": 0.25}, {"text": "none"})


def test_plan_file_round_trip_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    assert RetentionPlan.load(path) == plan()
    assert sum('"kv_head"' in line for line in path.read_text().splitlines()) == 4
    assert plan().held(100) == 12 + 100 + 0 + 5
    assert plan().share(100) == 117 / 400
    assert plan().nbytes(100, head_dim=64, itemsize=2, batch=3) == 117 * 2 * 64 * 2 * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["heads"].pop(), "KV head 1 of layer 1 is missing"),
        (lambda c: c["heads"].append(c["heads"][0]), "KV head 0 of layer 0 occurs twice"),
        (lambda c: c["heads"][0].update(layer=7), "KV head 0 of layer 7 does not exist"),
        (lambda c: c["heads"][0].update(strategy="magic"), "heads.0.strategy"),
        (lambda c: c["heads"][0].update(window_size=-7), "heads.0.window_size"),
        (lambda c: c.update(schema=2), "plan schema 2 is not known"),
        (lambda c: c["model"].update(num_attention_heads=5), "5 query heads cannot be shared by 2"),
    ],
)
def test_damaged_plans_are_named(change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        RetentionPlan.load(path)
