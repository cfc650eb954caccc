"""The head-aware compressor: its sources, files with defects, its summary, and the loop of compress after every pass."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import HeadClassification, HeadType, save_classifications
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL, PRUNED, Retention
from kvcompress.methods import HeadAwareCompressor, head_aware_compress
from kvcompress.models.architecture import Architecture
from tests.cache.cache_tools import FAMILIES, PLANS, compressor_for, feed, inputs_for, model_of, padded, tokens

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


def plan_file(tmp_path, edit):
    path = tmp_path / "plan.json"
    RetentionPlan.uniform(Retention(4, 8), 2, 3, 6).save(path)
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan: plan["heads"].append(plan["heads"][0]), "KV head 0 of layer 0 occurs twice"),
        (lambda plan: plan["heads"].pop(), "KV head 2 of layer 1 is missing"),
        (lambda plan: plan["heads"][1].update(strategy="magic"), "magic"),
        (lambda plan: plan["heads"][1].update(window_size=-3), "window_size"),
        (lambda plan: plan.update(schema=2), "plan schema 2 is not known"),
    ],
)
def test_plan_files_with_defects(tmp_path, edit, message):
    with pytest.raises(InputError, match=message):
        HeadAwareCompressor.from_plan(plan_file(tmp_path, edit))


def test_truncated_files(tmp_path):
    path = plan_file(tmp_path, lambda plan: None)
    path.write_text(path.read_text()[:-30])
    for load in (HeadAwareCompressor.from_plan, HeadAwareCompressor.from_classifications):
        with pytest.raises(InputError, match="is not complete JSON"):
            load(path)
        with pytest.raises(InputError, match="cannot read"):
            load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows.append(dict(rows[0])), "head 0 of layer 0 occurs twice"),
        (lambda rows: rows.pop(1), "head 1 of layer 0 is missing"),
        (lambda rows: rows[1].update(compression_strategy="magic"), "magic"),
    ],
)
def test_classification_files_with_defects(tmp_path, edit, message):
    rows = [
        {"layer_idx": layer, "head_idx": head, "head_type": "mixed", "confidence": 0.5, "compression_strategy": "none"}
        for layer in range(2)
        for head in range(3)
    ]
    edit(rows)
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classifications": rows}))
    with pytest.raises(InputError, match=message):
        HeadAwareCompressor.from_classifications(path)


NEW = 12


def seeds_loop(model, compressor, ids, mask=None, repeats=1):
    """Step 5 of the seed's README, greedy; `compress` may be called more than once a pass."""
    past, out = None, ids
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(NEW):
        seen = 0 if past is None else past.get_seq_length()
        kwargs = inputs_for(mask, seen, out.shape[1])
        outputs = model(out[:, seen:], past_key_values=past, use_cache=True, **kwargs)
        past = outputs.past_key_values
        for _ in range(repeats):
            past = compressor.compress(past, attention_mask=mask)
        out = torch.cat((out, outputs.logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return out, past


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_gives_the_tokens_of_generate(family, plan, batch):
    model = model_of(family)
    ids, mask = (tokens(1, 25), None) if batch == 1 else padded(3, 25)
    compressor = compressor_for(model, plan)
    with compressor.attached(model):
        new = compressor.new_cache(model.config)
        expected = model.generate(
            ids, attention_mask=mask, past_key_values=new, max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        found, past = seeds_loop(model, compressor, ids, mask, repeats=2)
    assert torch.equal(found, expected)
    assert past.held() == new.held()


@pytest.mark.parametrize("family", FAMILIES)
def test_compressing_a_dynamic_cache_equals_exact_prefill(family):
    model = model_of(family)
    ids, mask = padded(3, 40)
    compressor = compressor_for(model, "mixed")
    with compressor.attached(model):
        source = DynamicCache(config=model.config)
        feed(model, source, ids[:, :28], [28], mask[:, :28])
        before = [layer.keys.clone() for layer in source.layers]
        past = compressor.compress(source, attention_mask=mask[:, :28])
        # Compressing leaves the source alone, and what came out of it comes back as it is.
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(source.layers, before, strict=True))
        assert compressor.compress(past) is past
        assert compressor_for(model, "mixed").compress(past) is past
        kwargs = inputs_for(mask, 28, 40)
        found = model(ids[:, 28:], past_key_values=past, use_cache=True, **kwargs).logits
        expected = feed(model, compressor.new_cache(model.config), ids, [28, 12], mask)[:, 28:]
    assert (found - expected).abs().max() < 1e-5


def test_a_cache_made_without_the_config_of_a_sliding_model():
    model = model_of("mistral")
    ids = tokens(1, 45)
    for plan in ("all_full", "mixed"):
        compressor = compressor_for(model, plan)
        with compressor.attached(model):
            source = DynamicCache()  # knows nothing of the model's sliding window
            feed(model, source, ids[:, :28], [28])
            found = feed(model, compressor.compress(source), ids[:, 28:], [5, 1])
            expected = feed(model, compressor.new_cache(model.config), ids, [28, 5, 1])[:, 28:]
        assert (found - expected).abs().max() < 1e-5


def test_skipped_layers_stay_full_and_count():
    model = model_of("llama")
    compressor = HeadAwareCompressor([[Retention(2, 5)] * 6] * 2, skip_layers=[0])
    with compressor.attached(model):
        past = compressor.compress(model(tokens(1, 30), use_cache=True).past_key_values)
    assert past.held() == [[30] * 3, [7] * 3]
    assert past.nbytes == 2 * 4 * 8 * 3 * (32 + 7)
    assert compressor.get_compression_summary()["compressible_heads"] == 6


def test_the_function_form(tmp_path):
    model = model_of("llama")
    source = model(tokens(1, 30), use_cache=True).past_key_values
    uniform = head_aware_compress(source, num_layers=2, num_heads=6, default_sink_size=3, default_window_size=4)
    assert uniform.held() == [[7] * 3] * 2
    skipping = head_aware_compress(source, num_layers=2, num_heads=6, skip_layers=[1])
    assert skipping.held() == [[12] * 3, [30] * 3]
    given = head_aware_compress(source, compressor=compressor_for(model, "no_sinks"), num_layers=99)
    assert given.held() == [[7] * 3] * 2
    assert head_aware_compress(given, compressor=compressor_for(model, "no_sinks")) is given
