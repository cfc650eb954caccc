"""Where a head-aware compressor comes from, and what it says of itself."""

import json
from pathlib import Path

import pytest

from kvcompress.core.head_classes import HeadClassification, HeadType, save_classifications
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention
from kvcompress.methods import HeadAwareCompressor
from kvcompress.models.architecture import Architecture
from tests.cache.cache_tools import model_of

PUBLISHED = Path(__file__).parents[2] / "../shared/reference/pythia-2.8b/refined_classifications.json"


def shape(layers, kv_heads, query_heads):
    return Architecture(layers, kv_heads, (None,) * layers, query_heads)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published Pythia-2.8b classification is not here")
def test_the_published_classification_loads_as_it_is():
    compressor = HeadAwareCompressor.from_classifications(PUBLISHED)
    summary = compressor.get_compression_summary()
    assert summary["total_heads"] == 1024
    assert summary["compressible_heads"] == 822
    assert summary["heads_with_sinks"] == 813
    assert summary["strategies"] == {"full": 202, "sink_window": 813, "window_only": 9}
    rows = json.loads(PUBLISHED.read_text())["classifications"]
    kept = compressor.plan_for(shape(32, 32, 32))
    for row in rows:
        here = kept[row["layer_idx"]][row["head_idx"]]
        if row["compression_strategy"] == "none" or row["recommended_window"] == -1:
            assert here == FULL
        else:
            sinks = row["sink_size"] if row["keep_sinks"] else 0
            assert here == Retention(sinks, row["recommended_window"])


def test_query_heads_are_joined_once_the_kv_heads_are_known(tmp_path):
    def head(index, strategy, window, sinks):
        return HeadClassification(
            0, index, HeadType.MIXED, 0.5, recommended_window=window, keep_sinks=sinks, compression_strategy=strategy
        )

    path = tmp_path / "classes.json"
    rows = [head(0, "sink_window", 8, True), head(1, "window_only", 16, False)]
    rows += [head(2, "prune", 0, False), head(3, "full", -1, False)]
    save_classifications(path, rows)
    union = HeadAwareCompressor.from_classifications(path)
    assert union.plan_for(shape(1, 4, 4)) == [[Retention(4, 8), Retention(0, 16), PRUNED, FULL]]
    assert union.plan_for(shape(1, 2, 4)) == [[Retention(4, 16), FULL]]
    assert union.plan_for(shape(1, 1, 4)) == [[FULL]]
    least = HeadAwareCompressor.from_classifications(path, join="intersection")
    assert least.plan_for(shape(1, 2, 4)) == [[Retention(0, 8), PRUNED]]


def test_a_plan_comes_back_from_its_file(tmp_path):
    layers = ((Retention(4, 8), FULL), (PRUNED, Retention(0, 3)))
    RetentionPlan(layers, 4, "tiny").save(tmp_path / "plan.json")
    compressor = HeadAwareCompressor.from_plan(tmp_path / "plan.json")
    assert compressor.plan_for(shape(2, 2, 4)) == layers
    assert compressor.get_compression_summary() == {
        "num_layers": 2,
        "heads_per_layer": 2,
        "heads_are": "KV heads",
        "total_heads": 4,
        "strategies": {"full": 1, "prune": 1, "sink_window": 1, "window_only": 1},
        "compressible_heads": 3,
        "heads_with_sinks": 1,
        "mean_bounded_slots": 7.5,
        "skip_layers": [],
    }


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        ("sink_window", Retention(4, 508)),
        ("window_only", Retention(0, 508)),
        ("full", FULL),
        ("none", FULL),
        ("prune", PRUNED),
    ],
)
def test_the_same_for_every_head_of_a_model(strategy, kept):
    config = model_of("llama").config
    compressor = HeadAwareCompressor.from_model_config(
        config, default_strategy=strategy, sink_size=4, window_size=508, skip_layers=[1]
    )
    assert [layer.retention for layer in compressor.new_cache(config).layers] == [[kept] * 3, [FULL] * 3]
