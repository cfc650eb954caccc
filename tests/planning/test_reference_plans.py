"""Plans to compare with: equal cost to the slot, and controls that keep what they should."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvcompress.core.head_classes import ClassificationFile, HeadType
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention
from kvcompress.planning.reference_plans import (
    class_table_plan,
    flat,
    inverted,
    per_layer,
    shuffled,
    size_key,
    uniform_at,
)

retentions = st.one_of(
    st.just(FULL), st.just(PRUNED), st.builds(Retention, st.integers(0, 6), st.integers(1, 99), st.just(0), st.just(""))
)
layers = st.lists(st.tuples(retentions, retentions, retentions), min_size=2, max_size=5)
TOKENS = 128


def plan(kept) -> RetentionPlan:
    return RetentionPlan(tuple(kept), 6)


@given(layers)
def test_uniform_holds_exactly_as_much(kept) -> None:
    original = plan(kept)
    if original.held(TOKENS) >= 2 * 3 * len(kept):  # a uniform head needs a window
        even = uniform_at(original, TOKENS)
        assert even.held(TOKENS) == original.held(TOKENS)
        sizes = [size_key(one) for one in flat(even)]
        assert max(sizes) - min(sizes) <= 1


@given(layers, st.integers(0, 5))
def test_controls_keep_the_retentions(kept, seed: int) -> None:
    original = plan(kept)
    for control in (shuffled(original, seed), inverted(original)):
        assert Counter(flat(control)) == Counter(flat(original))
        assert control.held(TOKENS) == original.held(TOKENS)
    order = sorted(range(3 * len(kept)), key=lambda i: size_key(flat(original)[i]))
    turned = [size_key(flat(inverted(original))[i]) for i in order]
    assert turned == sorted(turned, reverse=True)


def test_shuffles_differ_by_seed() -> None:
    original = plan([(Retention(4, 8), FULL, Retention(0, 3))] * 4)
    assert shuffled(original, 0) == shuffled(original, 0) != shuffled(original, 1)


def test_per_layer_keeps_what_layers_hold() -> None:
    original = plan([(Retention(4, 8), FULL, Retention(0, 33)), (FULL, FULL, FULL)])
    spread = per_layer(original, TOKENS)
    for before, after in zip(original.layers, spread.layers, strict=True):
        assert sum(one.held(TOKENS) for one in before) == sum(one.held(TOKENS) for one in after)


def test_class_table_joins_query_heads_and_replaces_windows() -> None:
    kinds = [("sink_positional", 8, "sink_window"), ("sink_mixed", 20, "sink_window")]
    kinds += [("mixed", -1, "full"), ("true_positional", 16, "window_only")]
    rows = [
        {"layer_idx": 0, "head_idx": i, "head_type": kind, "confidence": 0.5, "recommended_window": window}
        | {"compression_strategy": strategy, "keep_sinks": strategy == "sink_window"}
        for i, (kind, window, strategy) in enumerate(kinds)
    ]
    file = ClassificationFile.model_validate({"classifications": rows})
    assert flat(class_table_plan(file, 2)) == [Retention(4, 20), FULL]
    wide = {HeadType.SINK_MIXED: 256, HeadType.MIXED: 32}
    assert flat(class_table_plan(file, 2, wide)) == [Retention(4, 256), Retention(4, 32)]
