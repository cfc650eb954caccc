"""Comparison of contenders at equal bytes: the same documents and facts for all, differences with intervals.

Two protocols, see `perplexity`. Rows of both have the same fields; `protocol` tells them apart.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.evaluation.contenders import Contender, beyond_contenders, compressors_of
from kvcompress.evaluation.environment import environment
from kvcompress.evaluation.intervals import Interval, paired_difference
from kvcompress.evaluation.params import CONTINUATION, STREAMING, AblationParams, ScoringParams
from kvcompress.evaluation.perplexity import FULL_CACHE, Documents, QualityResult, score_contenders
from kvcompress.evaluation.results import ResultStore
from kvcompress.evaluation.retrieval import retrieval_rows, retrieve
from kvcompress.texts.corpora import documents, documents_of_all
from kvcompress.texts.retrieval_tasks import Case, make_cases

BEYOND_WINDOW = 1024  # predicted tokens a point, past the trained context

Row = dict[str, Any]


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_id: str,
    texts: Mapping[str, str],
    contenders: Mapping[str, Contender],
    params: ScoringParams,
    streaming: Collection[str] | None = None,
    context: int = 0,
    store: ResultStore | None = None,
) -> dict[str, Any]:
    """Compare contenders on evaluation `texts` (name -> text).

    Parameters
    ----------
    streaming, context, store: see `compare_documents`.

    Returns `{"model", "texts", "environment", "settings", "rows"}`, with `context` also "continuation": one row a
    contender and protocol. Raises `InputError` for texts too short.
    """
    batch = documents_of_all(tokenizer, texts, params.max_tokens, params.documents_per_text)
    places = params.retrieval_lengths, params.retrieval_depths, params.retrieval_per_depth
    cases = make_cases(tokenizer, texts, *places, tasks=params.retrieval_tasks)
    found = compare_documents(model, batch, cases, contenders, params, streaming, context, store)
    origin = {"model": model_id, "texts": list(texts), "environment": environment(model)}
    return origin | {"settings": params.model_dump()} | found


def compare_documents(
    model: PreTrainedModel,
    batch: Documents,
    cases: Sequence[Case],
    contenders: Mapping[str, Contender],
    params: ScoringParams,
    streaming: Collection[str] | None = None,
    context: int = 0,
    store: ResultStore | None = None,
) -> dict[str, list[Row]]:
    """Compare contenders on these documents and facts.

    Parameters
    ----------
    streaming: names of contenders that are scored in the streaming protocol, to which the full cache and their rivals
        are added [default: all].
    context: tokens of an exact prefill, after which all contenders are scored in the continuation protocol [default: 0,
        that protocol is left out].
    store: results to reuse, and where new ones are kept.

    Returns "rows" of the streaming protocol, and "continuation" if there is a context; see `row`.
    """
    compressors = compressors_of(contenders)
    found = retrieve(model, cases, compressors, params.retrieval_prefill, params.chunk_size, store=store)
    named = set(contenders if streaming is None else streaming)
    named |= {rival for name in named if (rival := contenders[name].rival)} | ({FULL_CACHE} if named else set())
    fields: dict[str, tuple[str, int, list[str]]] = {
        "rows": (STREAMING, 0, [name for name in contenders if name in named])
    }
    if context:
        fields["continuation"] = (CONTINUATION, context, list(contenders))
    result: dict[str, list[Row]] = {}
    for field, (protocol, first, names) in fields.items():
        chosen = {name: compressors[name] for name in names}
        sizes = params.chunk_size, params.rank_every
        scores = score_contenders(model, batch, chosen, *sizes, context=first, store=store) if names else {}
        result[field] = [row(contenders[name], contenders, scores, protocol, cases, found[name]) for name in names]
    return result


def row(
    contender: Contender,
    contenders: Mapping[str, Contender],
    scores: Mapping[str, QualityResult],
    protocol: str,
    cases: Sequence[Case],
    answered: Sequence[bool],
) -> Row:
    """Return a contender's bytes, quality by text and pooled, differences with intervals, and facts found.

    Differences are NLL in nats a token. In the continuation protocol `nll_over` has the difference to each contender of
    the same bytes.
    """
    score, full = scores[contender.name], scores[FULL_CACHE]
    result: Row = {
        "name": contender.name,
        "family": contender.family,
        "ablation": contender.ablation,
        "protocol": protocol,
        "share": round(score.nbytes_end / full.nbytes_end, 6),
        "mean_share": round(score.nbytes_mean / full.nbytes_mean, 6),
        "nbytes_end": score.nbytes_end,
        "nbytes_mean": round(score.nbytes_mean),
        "nbytes_peak": score.nbytes_peak,
        "tokens": score.nll.size,
        "perplexity": round(score.perplexity(), 4),
        "perplexity_gmean": round(score.geometric_mean(), 4),
        "accuracy": round(score.mean("correct"), 6),
        "same_top": round(score.mean("same_top"), 6),
        "kl": round(score.mean("kl"), 6),
        "texts": text_rows(score),
    }
    if protocol == STREAMING:
        first = min(contender.first_eviction, score.nll.shape[1] - 1)
        result["after_eviction"] = {
            "first_query": first,
            "tokens": score.nll[:, first:].size,
            "perplexity": round(score.perplexity(first=first), 4),
            "full_cache": round(full.perplexity(first=first), 4),
        }
    result["nll_over_full"] = rounded(paired_difference(score.nll, full.nll))
    result["seconds"] = round(score.seconds, 2)
    if protocol == STREAMING:
        ranked = contender.plan is None
        result["read"] = f"real cache, {'keys ranked after every pass' if ranked else 'streaming prefill'}"
    else:
        result["read"] = "real cache, exact prefill"
    if contender.rival:
        result["rival"] = rival_row(score, contender.rival, scores[contender.rival])
        if protocol == CONTINUATION:
            equal = (one.name for one in contenders.values() if contender.rival in (one.name, one.rival))
            result["nll_over"] = {
                name: rounded(paired_difference(score.nll, scores[name].nll))
                for name in equal
                if name != contender.name
            }
    result["retrieval"] = retrieval_rows(cases, answered)
    return result


def text_rows(score: QualityResult) -> dict[str, dict[str, float]]:
    """Return quality text by text."""
    return {
        text: {
            "perplexity": round(score.perplexity(text), 4),
            "accuracy": round(score.mean("correct", text), 6),
            "kl": round(score.mean("kl", text), 6),
        }
        for text in dict.fromkeys(score.texts)
    }


def rival_row(score: QualityResult, name: str, rival: QualityResult) -> Row:
    """Return ratios of bytes and perplexities to the rival called `name`, and the difference in NLL."""
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


def stream_beyond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    params: AblationParams,
    classifications: str | None,
    trained: int,
) -> dict[str, Any]:
    """Stream `params.beyond_tokens` tokens of the longest text through bounded caches, past the `trained` context.

    Returns `{"text", "context", "rows"}` with one row a contender and window of BEYOND_WINDOW tokens: mean NLL in nats,
    and bytes held at its end. Raises `InputError` for a text too short.
    """
    name, longest = max(texts.items(), key=lambda item: len(item[1]))
    (tokens,) = documents(tokenizer, name, longest, params.beyond_tokens, 1)
    contenders = beyond_contenders(model.config, classifications, params.sizes[-2])
    size = params.chunk_size
    scores = score_contenders(model, {name: [tokens]}, compressors_of(contenders), size, size, references=False)
    rows = []
    for contender, score in scores.items():
        for last in range(BEYOND_WINDOW, score.nll.shape[1] + 1, BEYOND_WINDOW):
            nll, held = score.nll[0, last - BEYOND_WINDOW : last], score.held[0, -(-last // size) - 1]
            rows.append({"name": contender, "tokens": last, "nll": round(float(nll.mean()), 4), "nbytes": int(held)})
    return {"text": name, "context": trained, "rows": rows}
