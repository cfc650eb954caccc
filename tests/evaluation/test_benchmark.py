"""The benchmark on a tiny model: quality against one masked pass, bytes against the plan's own count, turns, and rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.cache.storage import allocated_slots
from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL as FULL_HEAD
from kvcompress.core.retention import PRUNED, Retention
from kvcompress.evaluation import timing
from kvcompress.evaluation.benchmark import Record, benchmark_rows, run_benchmark, samples_of
from kvcompress.evaluation.contenders import Contender, baseline, benchmark_contenders, head_aware
from kvcompress.evaluation.params import BASELINES, FULL, BenchmarkParams
from kvcompress.reporting.benchmark import metrics
from tests.reference.oracle import judged
from tests.tiny import VOCABULARY, prose, tiny_model, tiny_tokenizer

PARAMS = BenchmarkParams(num_samples=2, max_tokens=64, max_new_tokens=12, turn=4, share=0.25, sinks=2)
PLANS = {
    "bounded": [[Retention(4, 12)] * 2, [Retention(0, 30)] * 2],
    "mixed": [[Retention(2, 7), FULL_HEAD], [PRUNED, Retention(0, 30)]],
}
SLOT = 2 * 8 * 4  # bytes of one head's K and V of one token: head_dim 8, float32


def plan(name: str) -> RetentionPlan:
    return RetentionPlan(tuple(map(tuple, PLANS[name])), 4)


def samples(count: int = 2, length: int = 76) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(f"text {i}", torch.randint(0, VOCABULARY, (length,), generator=generator)) for i in range(count)]


def contenders() -> list[Contender]:
    config = tiny_model("llama").config
    found = benchmark_contenders((FULL, *BASELINES), config, PARAMS, None)
    return [*found, *(head_aware(name, plan(name)) for name in PLANS)]


@pytest.fixture(scope="module")
def records() -> dict[str, Record]:
    return run_benchmark(tiny_model("llama"), samples(), contenders(), PARAMS, progress=False)


def oracle(layers: list[list[Retention]]) -> tuple[np.ndarray, np.ndarray]:
    """NLL and correctness of the tokens after the prompt, `[sample, token]`, from one pass with a mask a head."""
    model, found = tiny_model("llama"), []
    for _, tokens in samples():
        with torch.inference_mode(), judged(model, layers, "exact", PARAMS.max_tokens):
            logits = model(tokens[None], use_cache=False).logits[0, PARAMS.max_tokens - 1 : -1]
        right = tokens[PARAMS.max_tokens :]
        nll = torch.nn.functional.cross_entropy(logits, right, reduction="none")
        found.append((nll.numpy(), (logits.argmax(-1) == right).numpy()))
    return np.stack([nll for nll, _ in found]), np.stack([correct for _, correct in found])


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        (FULL, [[FULL_HEAD] * 2] * 2),
        ("streaming_llm", [[Retention(2, 14)] * 2] * 2),
        ("recent_only", [[Retention(0, 16)] * 2] * 2),
        *PLANS.items(),
    ],
)
def test_quality_is_that_of_one_masked_pass(records: dict[str, Record], name: str, layers: list) -> None:
    nll, correct = oracle(layers)
    np.testing.assert_allclose(records[name].nll, nll, atol=1e-4)
    np.testing.assert_array_equal(records[name].correct, correct)


def test_bytes_are_the_plans_own(records: dict[str, Record]) -> None:
    seen = [64 + step for step in range(1, 12)] * 2
    assert records[FULL].held == [4 * tokens * SLOT for tokens in seen]
    assert records["bounded"].held == [plan("bounded").nbytes(tokens, head_dim=8, itemsize=4) for tokens in seen]
    heads = [kept for layer in PLANS["mixed"] for kept in layer]
    assert records["mixed"].held == [sum(allocated_slots(kept, tokens) for kept in heads) * SLOT for tokens in seen]
    for name, record in records.items():
        assert record.peak_held >= max(record.held), name
    assert records["recent_only"].held == [4 * 16 * SLOT] * 22
    assert records["l2_compress"].nll != records[FULL].nll  # it did drop keys


def test_everyone_is_timed_equally_often(records: dict[str, Record]) -> None:
    for name, record in records.items():
        assert np.shape(record.nll) == np.shape(record.correct) == (2, 12)
        assert len(record.prefill_ms) == len(record.first_token_ms) == 2
        assert len(record.step_ms) == 2 * (3 + 3 + 2)  # 11 steps in turns of 4, 4 and 3, the first of each not timed
        assert len(record.compress_ms) == (0 if name == FULL else 6)
        assert record.peak_device is None  # no GPU here
        assert min(record.step_ms) > 0
        assert all(first >= alone for first, alone in zip(record.first_token_ms, record.prefill_ms, strict=True))
    assert torch.is_grad_enabled()


def test_the_full_cache_is_transformers_own_and_turns_are_short() -> None:
    model, calls = tiny_model("llama"), []

    @contextmanager
    def watched() -> Iterator[None]:
        def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            calls.append((kwargs["past_key_values"], model.config._attn_implementation, args[0].shape[1]))

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        yield
        hook.remove()

    with watched():
        run_benchmark(model, samples(), contenders(), PARAMS, progress=False)
    full = [attention for cache, attention, _ in calls if type(cache) is DynamicCache]
    assert full == ["sdpa"] * (3 + 2 * 12)  # warm-up: the prompt and two steps
    assert {attention for cache, attention, _ in calls if isinstance(cache, RaggedCache)} == {"kvcompress"}
    steps = [id(cache) for cache, _, length in calls[3 * len(contenders()) :] if length == 1]
    turns = [(one, len(list(same))) for one, same in groupby(steps)]
    assert {length for _, length in turns} == {4, 3}
    first = [turns[i][0] for i in range(0, 3 * len(contenders()), len(contenders()))]
    assert len(set(first)) == 3  # who begins changes


def test_rows_compare_with_the_full_cache_of_the_same_run(records: dict[str, Record]) -> None:
    rows = {row["name"]: row for row in benchmark_rows(contenders(), records, weights=1000)}
    full, mixed = rows[FULL], rows["mixed"]
    assert list(rows) == [contender.name for contender in contenders()]
    assert full["compress_ms"] is None
    assert full["notes"] == {
        "compress_ms": "keeps everything",
        "peak_device_bytes": "on a CPU methods cannot be told apart: see process_peak_bytes",
        "nll": "24 tokens are too few for an interval",
    }
    own = {name: full["to_full"][name] for name in full["to_full"] if name != "nll"}
    assert own == dict.fromkeys(own, 1.0)
    assert mixed["perplexity"] == pytest.approx(np.exp(np.mean(records["mixed"].nll)), abs=1e-4)
    assert mixed["to_full"]["perplexity_ratio"] == pytest.approx(mixed["perplexity"] / full["perplexity"], rel=1e-3)
    assert mixed["to_full"]["bytes_share"] == pytest.approx(mixed["bytes_mean"] / full["bytes_mean"], abs=1e-4)
    ratios = sorted(a / b for a, b in zip(records[FULL].step_ms, records["mixed"].step_ms, strict=True))
    assert ratios[7] - 1e-4 <= mixed["to_full"]["decode_times_faster"] <= ratios[8] + 1e-4  # 16 timed steps
    assert mixed["decode_ms"]["p10"] <= mixed["decode_ms"]["median"] <= mixed["decode_ms"]["p90"]
    assert set(metrics([{"rows": list(rows.values())}])["mixed"]) == {
        "first_token_ms", "decode_ms", "perplexity", "accuracy", "decode_times_faster", "first_token_times_faster",
        "bytes_share", "perplexity_ratio",
    }  # fmt: skip


def test_an_interval_needs_enough_tokens_and_a_gpu_counts_the_weights() -> None:
    made = {name: Record(64, [1.0], [1.0], [], [1.0], held=[1], peak_held=1, peak_device=5) for name in (FULL, "other")}
    generator = np.random.default_rng(0)
    made[FULL].nll = generator.random((8, 64)).tolist()
    made["other"].nll = (np.array(made[FULL].nll) + 0.5 + 0.1 * generator.random((8, 64))).tolist()
    for record in made.values():
        record.correct = [[True] * 64] * 8
    row = benchmark_rows([Contender(FULL, FULL), Contender("other", "other")], made, weights=1000)[1]
    change = row["to_full"]["nll"]
    assert 0.5 < change["low"] < change["mean"] < change["high"] < 0.6
    assert row["peak_device_bytes"] == 1005


def test_samples_come_from_each_text_in_turn() -> None:
    texts = {name: prose(100, seed) for seed, name in enumerate(("a", "b"))}
    found = samples_of(tiny_tokenizer(), texts, PARAMS.model_copy(update={"num_samples": 3}))
    assert [name for name, _ in found] == ["a", "b", "a"]
    assert {len(tokens) for _, tokens in found} == {76}
    assert not torch.equal(found[0][1], found[2][1])
    with pytest.raises(InputError, match=r"text 'a' has .* tokens, but 50 documents"):
        samples_of(tiny_tokenizer(), texts, PARAMS.model_copy(update={"num_samples": 100}))


def test_who_cannot_take_part_is_told_why(tmp_path: Path) -> None:
    config = tiny_model("llama").config
    with pytest.raises(InputError, match=r"--method is 'h2o', expected one of full, l2_compress"):
        benchmark_contenders(["h2o"], config, PARAMS, None)
    with pytest.raises(InputError, match=r"cannot read .*classes.json"):
        benchmark_contenders(["head_aware"], config, PARAMS, tmp_path / "classes.json")
    with pytest.raises(InputError, match=r"share is 0.03 .* 2 slots a head, expected more than benchmark.sinks 2"):
        baseline("recent_only", 2, PARAMS.model_copy(update={"share": 0.03}))
    RetentionPlan.uniform(FULL_HEAD, 3, 2, 4).save(tmp_path / "other.json")
    with pytest.raises(InputError, match=r"other.json is for \(3, 2, 4\) layers.* the model has \(2, 2, 4\)"):
        benchmark_contenders(["head_aware"], config, PARAMS, None, [tmp_path / "other.json"])
    names = [one.name for one in benchmark_contenders(["recent_only", "full", "recent_only"], config, PARAMS, None)]
    assert names == ["full", "recent_only"]


@pytest.mark.parametrize("layers", [2, 30])
@pytest.mark.parametrize("method", BASELINES)
def test_baselines_keep_equally_much_of_the_prompt(method: str, layers: int) -> None:
    config = LlamaConfig(num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, hidden_size=8)
    params = BenchmarkParams(max_tokens=512, share=0.25)
    contender = baseline(method, layers, params)
    cache = DynamicCache(config=config)
    for layer in range(layers):
        cache.update(torch.randn(1, 1, 512, 4), torch.randn(1, 1, 512, 4), layer)
    assert contender.compressor is not None
    held = [sum(heads) for heads in contender.compressor.compress(cache, config=config).held()]
    assert sum(held) == pytest.approx(0.25 * layers * 512, rel=0.01)
    assert (held[0] == 512) == (layers == 30 and "l2" in method)


def test_memory_is_counted_for_one_contender_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up allocator: others hold 100 and 150 bytes while this contender has its two turns."""
    now = {"held": 100, "most": 100}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now["held"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: now["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: now.update(most=now["held"]))
    memory = timing.OwnMemory([torch.device("cuda:0"), torch.device("cpu")])
    with memory.watched():
        now.update(held=110, most=130)
    assert memory.peak == 30
    now.update(held=160, most=500)  # others work, and hold 50 more
    with memory.watched():
        now.update(held=165, most=185)
    assert memory.peak == 10 + 25
    assert timing.OwnMemory([torch.device("cpu")]).peak is None


def test_clock_and_bandwidth() -> None:
    result, milliseconds = timing.timed(lambda: sum(range(1000)), [torch.device("cpu")])
    assert (result, milliseconds > 0) == (499500, True)
    assert timing.Spread.of([3.0, 1.0, 2.0]) == pytest.approx((2.0, 1.2, 2.8))
    assert timing.times_faster([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2
    assert timing.copy_bandwidth(torch.device("cpu"), rounds=1) > 1e6
    assert timing.process_peak_bytes() > 1e7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_memory_is_known() -> None:
    model = tiny_model("llama").to("cuda")
    found = run_benchmark(model, samples(), contenders(), PARAMS, progress=False)
    for name, record in found.items():
        assert record.peak_device is not None, name
        assert record.peak_device >= max(record.held), name
