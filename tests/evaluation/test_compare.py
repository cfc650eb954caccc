"""The ablation end to end on a tiny model, and its conclusions."""

from typing import Any

import numpy as np
import pytest
import torch

from kvcompress.analysis.classification import classify_heads
from kvcompress.analysis.params import ThresholdParams
from kvcompress.collect.collect import collect_attention
from kvcompress.collect.params import StatisticsParams
from kvcompress.collect.statistics import compute_statistics
from kvcompress.core.head_classes import save_classifications
from kvcompress.evaluation.compare import BEYOND_WINDOW, compare_documents, stream_beyond
from kvcompress.evaluation.contenders import ABLATIONS, ablation_contenders
from kvcompress.evaluation.params import AblationParams
from kvcompress.evaluation.perplexity import FULL_CACHE
from kvcompress.methods import StreamingLLMCompressor
from kvcompress.reporting.comparison import conclusion, metrics, report
from kvcompress.texts import corpora
from kvcompress.texts.retrieval_tasks import make_cases
from tests.tiny import prose, tiny_model, tiny_tokenizer

PARAMS = AblationParams(
    max_tokens=128, sizes=[32, 64], sink_counts=[0, 2, 4], random_seeds=2, retrieval_lengths=[160], retrieval_depths=2
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = tokenizer(prose(40, 1), return_tensors="pt").input_ids[0]
    statistics = compute_statistics(collect_attention(model, [ids], progress=False), StatisticsParams())
    # bounds that put some of a random model's heads in a bounded class
    bounds = ThresholdParams(low_entropy=0.5, high_entropy=9.0, sink=sorted(h.sink_ratio for h in statistics)[4])
    path = tmp_path_factory.mktemp("classes") / "classes.json"
    save_classifications(path, classify_heads(statistics, bounds))
    contenders = ablation_contenders(ABLATIONS, model.config, PARAMS, path)
    documents = {
        name: [tokenizer(prose(60, seed), return_tensors="pt").input_ids[0, :128]]
        for name, seed in (("a", 5), ("b", 6))
    }
    cases = make_cases(tokenizer, {"a": prose(60, 7)}, PARAMS.retrieval_lengths, 2, 1)
    return compare_documents(model, documents, cases, contenders, PARAMS)["rows"]


def test_rivals_have_equal_bytes_and_everyone_is_there(rows: list[dict[str, Any]]) -> None:
    names = [row["name"] for row in rows]
    assert names[0] == FULL_CACHE
    assert len(set(names)) == len(names)
    assert {"4 + 28", "0 + 32", "2 + 62", "class table", "random 1", "inverted", "per layer"} <= set(names)
    with_rival = [row for row in rows if "rival" in row]
    assert len(with_rival) >= 9
    for row in with_rival:
        assert row["rival"]["bytes"] == pytest.approx(1, abs=0.01), row["name"]
        assert row["rival"]["name"] in names


def test_rows_are_complete(rows: list[dict[str, Any]]) -> None:
    full = rows[0]
    assert full["share"] == 1
    assert abs(full["kl"]) < 1e-6
    for row in rows:
        assert set(row["texts"]) == {"a", "b"}
        assert row["tokens"] == 2 * 127
        assert set(row["retrieval"]) == {"passkey", "needle", "lookup"}
        assert all(result["total"] == 2 for result in row["retrieval"].values())
        assert row["nbytes_peak"] >= row["nbytes_end"] > 0
        assert row["nll_over_full"]["low"] <= row["nll_over_full"]["mean"] <= row["nll_over_full"]["high"]
    small = next(row for row in rows if row["name"] == "4 + 28")
    assert small["share"] == 0.25
    assert small["after_eviction"]["first_query"] == 32


def test_past_the_trained_context_windows_hold_the_mean_of_their_tokens() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()  # its trained context is 512 tokens
    params = PARAMS.model_copy(update={"beyond_tokens": 2 * BEYOND_WINDOW + 1, "sizes": [32, 64], "chunk_size": 64})
    texts = {"short": prose(40, 1), "long": prose(700, 2)}
    found = stream_beyond(model, tokenizer, texts, params, None, 512)
    rows = found["rows"]
    assert (found["text"], found["context"]) == ("long", 512)
    assert [row["tokens"] for row in rows] == [BEYOND_WINDOW, 2 * BEYOND_WINDOW] * 3
    assert {row["nbytes"] for row in rows} == {2 * 2 * 32 * 2 * 8 * 4}
    (tokens,) = corpora.documents(tokenizer, "long", texts["long"], params.beyond_tokens, 1)
    name, compressor = "4 + 28, positions in the cache", StreamingLLMCompressor(4, 28, positions="cache")
    with torch.inference_mode(), compressor.attached(model):
        cache = compressor.new_cache(model.config, "streaming")
        losses = []
        for i in range(2 * BEYOND_WINDOW):  # token by token, the slow way
            logits = model(tokens[None, i : i + 1], past_key_values=cache).logits[0, -1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[i + 1])))
    mine = [row["nll"] for row in rows if row["name"] == name]
    expected = [np.mean(losses[:BEYOND_WINDOW]), np.mean(losses[BEYOND_WINDOW:])]
    np.testing.assert_allclose(mine, expected, atol=2e-3)


def made_row(low: float, high: float, nbytes: float = 1.0) -> dict[str, Any]:
    change = {"mean": (low + high) / 2, "low": low, "high": high}
    rival = {"name": "uniform", "bytes": nbytes, "perplexity": 10.0, "nll_over_rival": change}
    return {"name": "mine", "family": "priced", "share": 0.25, "perplexity": 9.0, "rival": rival}


def test_conclusions_say_which_of_two_wins() -> None:
    assert "mine wins against uniform: perplexity 9.00 against 10.00 at 25.0%" in str(conclusion(made_row(-0.2, -0.1)))
    assert "mine loses to uniform" in str(conclusion(made_row(0.1, 0.2)))
    assert "cannot be told apart" in str(conclusion(made_row(-0.1, 0.2)))
    assert "not comparable: the ratio of their bytes is 1.020" in str(conclusion(made_row(-0.2, -0.1, 1.02)))
    assert conclusion({"name": "full"}) is None


def test_report_and_metrics(rows: list[dict[str, Any]]) -> None:
    where = {"device": "d", "threads": 1, "dtype": "float32", "torch": "t", "transformers": "v"}
    result = {"model": "m", "texts": ["a", "b"], "environment": where, "settings": PARAMS.model_dump(), "rows": rows}
    text = report([result])
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(rows) + 2
    assert text.count("ΔNLL") >= 9
    assert set(metrics([result])) == {row["name"] for row in rows}
