"""An ablation: contenders on the same documents and cases, compared only at equal bytes, with intervals and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.evaluation.contenders import FULL_CACHE, Contender
from kvcompress.evaluation.environment import environment
from kvcompress.evaluation.intervals import Interval, paired_difference, wilson
from kvcompress.evaluation.params import ScoringParams
from kvcompress.evaluation.perplexity import Documents, Score, score_contenders
from kvcompress.evaluation.retrieval import retrieve
from kvcompress.texts.corpora import documents_of_all
from kvcompress.texts.retrieval_tasks import Case, make_cases


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_id: str,
    texts: Mapping[str, str],
    contenders: Mapping[str, Contender],
    params: ScoringParams,
) -> dict[str, Any]:
    """A whole result: the contenders on evaluation `texts` (name -> text), and where it was made.

    Raises `InputError` for texts too short.
    """
    length, depths = params.max_tokens, params.retrieval_depths
    batch = documents_of_all(tokenizer, texts, length, params.documents_per_text)
    cases = make_cases(tokenizer, texts, params.retrieval_lengths, depths, params.retrieval_per_depth)
    rows = run_ablation(model, batch, cases, contenders, params)
    result = {"model": model_id, "texts": list(texts), "environment": environment(model)}
    return result | {"settings": params.model_dump(), "rows": rows}


def run_ablation(
    model: PreTrainedModel,
    batch: Documents,
    cases: Sequence[Case],
    contenders: Mapping[str, Contender],
    params: ScoringParams,
) -> list[dict[str, Any]]:
    """One row a contender, in their order; see `row`."""
    compressors = {name: contender.compressor for name, contender in contenders.items()}
    scores = score_contenders(model, batch, compressors, params.chunk_size, params.rank_every)
    found = retrieve(model, cases, compressors, params.retrieval_prefill, params.chunk_size)
    return [row(contender, scores, cases, found[name]) for name, contender in contenders.items()]


def row(
    contender: Contender, scores: Mapping[str, Score], cases: Sequence[Case], answered: Sequence[bool]
) -> dict[str, Any]:
    """What is known of one contender: bytes, quality by text and pooled, differences with intervals, retrieval."""
    score, full = scores[contender.name], scores[FULL_CACHE]
    first = min(contender.first_eviction, score.nll.shape[1] - 1)
    result: dict[str, Any] = {
        "name": contender.name,
        "family": contender.family,
        "ablation": contender.ablation,
        "share": round(score.nbytes_end / full.nbytes_end, 6),
        "nbytes_end": score.nbytes_end,
        "nbytes_mean": round(score.nbytes_mean),
        "nbytes_peak": score.nbytes_peak,
        "tokens": score.nll.size,
        "perplexity": round(score.perplexity(), 4),
        "perplexity_gmean": round(score.geometric_mean(), 4),
        "accuracy": round(score.mean("correct"), 6),
        "kl": round(score.mean("kl"), 6),
        "texts": text_rows(score),
        "after_eviction": {
            "first_query": first,
            "tokens": score.nll[:, first:].size,
            "perplexity": round(score.perplexity(first=first), 4),
            "full_cache": round(full.perplexity(first=first), 4),
        },
        "nll_over_full": rounded(paired_difference(score.nll, full.nll)),
        "seconds": round(score.seconds, 2),
        "read": "real cache, keys ranked after every pass"
        if contender.plan is None
        else "real cache, streaming prefill",
    }
    if contender.rival:
        result["rival"] = rival_row(score, contender.rival, scores[contender.rival])
    result["retrieval"] = retrieval_rows(cases, answered)
    return result


def text_rows(score: Score) -> dict[str, dict[str, float]]:
    """Quality text by text."""
    return {
        text: {
            "perplexity": round(score.perplexity(text), 4),
            "accuracy": round(score.mean("correct", text), 6),
            "kl": round(score.mean("kl", text), 6),
        }
        for text in dict.fromkeys(score.texts)
    }


def rival_row(score: Score, name: str, rival: Score) -> dict[str, Any]:
    """How a contender does against its rival called `name`: ratios of bytes and perplexities, difference in NLL."""
    return {
        "name": name,
        "bytes": round(score.nbytes_end / rival.nbytes_end, 6),
        "perplexity": round(rival.perplexity(), 4),
        "gmean_ratio": round(score.geometric_mean() / rival.geometric_mean(), 5),
        "text_ratios": {
            text: round(score.perplexity(text) / rival.perplexity(text), 5) for text in dict.fromkeys(score.texts)
        },
        "nll_over_rival": rounded(paired_difference(score.nll, rival.nll)),
    }


def rounded(interval: Interval) -> dict[str, float]:
    return {"mean": round(interval.mean, 5), "low": round(interval.low, 5), "high": round(interval.high, 5)}


def retrieval_rows(cases: Sequence[Case], answered: Sequence[bool]) -> dict[str, Any]:
    """Share of each task's cases answered, with Wilson interval, by length and depth, and of needles by their kind."""
    result: dict[str, Any] = {}
    for task in dict.fromkeys(case.task for case in cases):
        mine = [(case, right) for case, right in zip(cases, answered, strict=True) if case.task == task]
        interval = wilson(sum(right for _, right in mine), len(mine))
        grid: dict[tuple[int, float], list[bool]] = {}
        for case, right in mine:
            grid.setdefault((case.length, case.depth), []).append(right)
        cells = [
            {"length": length, "depth": depth, "correct": sum(rights), "total": len(rights)}
            for (length, depth), rights in grid.items()
        ]
        result[task] = {
            "correct": sum(right for _, right in mine),
            "total": len(mine),
            "share": round(interval.mean, 4),
            "low": round(interval.low, 4),
            "high": round(interval.high, 4),
            "grid": cells,
        }
        kinds = dict.fromkeys(case.kind for case, _ in mine if case.kind)
        if kinds:
            of_kind = {kind: [right for case, right in mine if case.kind == kind] for kind in kinds}
            result[task]["kinds"] = {
                kind: {"correct": sum(rights), "total": len(rights)} for kind, rights in of_kind.items()
            }
    return result


def metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The few numbers a contender that `dvc metrics` compares."""
    return {
        row["name"]: {
            "share": row["share"],
            "perplexity": row["perplexity"],
            "accuracy": row["accuracy"],
            "kl": row["kl"],
            **{task: result["share"] for task, result in row["retrieval"].items()},
        }
        for row in rows
    }
