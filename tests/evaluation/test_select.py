"""A plan that chooses by queries, in the evaluations: its cache cannot be made from a full one afterwards."""

import torch

from kvcompress.core.plan import RetentionPlan
from kvcompress.core.retention import FULL as FULL_HEAD
from kvcompress.core.retention import Retention
from kvcompress.evaluation.benchmark import SELECTS_WHILE_READING, benchmark_rows, run_benchmark
from kvcompress.evaluation.contenders import Contender, head_aware
from kvcompress.evaluation.params import FULL, BenchmarkParams
from kvcompress.evaluation.perplexity import score_contenders
from kvcompress.evaluation.retrieval import retrieve
from kvcompress.methods import HeadAwareCompressor
from kvcompress.texts.retrieval_tasks import Case
from tests.cache.cache_tools import model_of, tokens

KINDS = Retention(2, 10, 20, "snapkv"), Retention(2, 30), Retention(0, 9, 9, "expected_attention"), FULL_HEAD
PLAN = RetentionPlan((KINDS[:3], (KINDS[3], *KINDS[:2])), 6)
LENGTH = 72


def test_a_benchmark_times_its_prefill_and_not_its_compression() -> None:
    model = model_of("llama")
    params = BenchmarkParams(num_samples=1, max_tokens=LENGTH, max_new_tokens=8, turn=4, share=0.25, sinks=2)
    contenders = [Contender(FULL, FULL), head_aware("plan", PLAN)]
    records = run_benchmark(model, [("text", tokens(1, LENGTH + 8)[0])], contenders, params, progress=False)
    row = benchmark_rows(contenders, records, 1)[1]
    assert row["compress_ms"] is None
    assert row["notes"]["compress_ms"] == SELECTS_WHILE_READING


def test_facts_are_asked_for_and_text_is_scored() -> None:
    model, compressor = model_of("llama"), HeadAwareCompressor.from_plan(PLAN)
    ids = tokens(1, LENGTH)
    with torch.no_grad(), compressor.attached(model):
        cache = compressor.new_cache(model.config)
        model(ids[:, :60], past_key_values=cache)
        rest = model(ids[:, 60:], past_key_values=cache).logits[0]
    answer = rest[-4:-1].argmax(-1).tolist()  # right for the first token at least
    for said, right in ((answer[:1], True), ([(answer[0] + 1) % 96], False)):
        case = Case("passkey", ids[0, :60].tolist(), ids[0, 60 : LENGTH - 3].tolist(), said, 0.5)
        assert retrieve(model, [case], {"plan": compressor}, progress=False) == {"plan": [right]}
    score = score_contenders(model, {"text": [ids[0]]}, {"plan": compressor}, chunk_size=16, progress=False)["plan"]
    assert score.nll.shape == (1, LENGTH - 1)
    assert score.nbytes_end < 2 * 4 * 8 * 6 * LENGTH
