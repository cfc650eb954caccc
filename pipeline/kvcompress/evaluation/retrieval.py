"""Facts far back in a context: does a compressed cache still find them?

The context is read and compressed before the question is known (exact prefill), or streamed together with it. A case
counts if greedy decoding gives exactly the answer, that is, if the most likely token is right at every place of the
answer, given the right tokens before it. One forward pass shows that.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.evaluation.intervals import wilson
from kvcompress.evaluation.perplexity import streaming_cache
from kvcompress.evaluation.prefill import read_prompt
from kvcompress.evaluation.results import ResultStore, hash_of, settings_of
from kvcompress.methods.compressor import Compressor
from kvcompress.models import distributed
from kvcompress.models.load import input_device
from kvcompress.texts.retrieval_tasks import Case


def answered(logits: Tensor, case: Case) -> bool:
    """Return True if greedy decoding answers: `logits` `[token, vocabulary]` end with those of question and answer."""
    places = logits[-len(case.answer) - 1 : -1]
    return places.argmax(-1).tolist() == case.answer


def retrieve(
    model: PreTrainedModel,
    cases: Sequence[Case],
    contenders: Mapping[str, Compressor],
    prefill: Literal["exact", "streaming"] = "exact",
    chunk_size: int = 256,
    progress: bool = True,
    store: ResultStore | None = None,
) -> dict[str, list[bool]]:
    """Return which cases each contender answers.

    Parameters
    ----------
    prefill: "exact" reads each context once for all contenders, "streaming" once for each of them, `chunk_size` tokens
        a pass.
    store: results to reuse, and where new ones are kept.

    Processes that share the work (`kvcompress.models.distributed`) ask some cases each.
    """
    own = distributed.mine([case.length for case in cases])
    found: dict[int, Tensor] = {}  # case -> [contender], 1 where it answers
    if distributed.one_model():
        store = None
    with torch.inference_mode(), distributed.progress(len(own), f"retrieval, {prefill}", "case", progress) as bar:
        for i in own:
            case = cases[i]
            size = chunk_size if prefill == "streaming" else 0
            how = ["retrieval", hash_of(case.context), hash_of(case.question + case.answer), prefill, size]
            rights = {name: store.get(settings_of(one), *how) if store else None for name, one in contenders.items()}
            missing = {name: one for name, one in contenders.items() if rights[name] is None}
            for name, right in answers(model, case, missing, prefill, chunk_size).items():
                rights[name] = right
                if store:
                    store.put(right, settings_of(missing[name]), *how)
            found[i] = torch.tensor([float(bool(right)) for right in rights.values()])
            bar.update()
    table = [[bool(right) for right in rights] for rights in distributed.in_order(found, len(cases))]
    return {name: [rights[j] for rights in table] for j, name in enumerate(contenders)}


def answers(
    model: PreTrainedModel,
    case: Case,
    contenders: Mapping[str, Compressor],
    prefill: Literal["exact", "streaming"],
    chunk_size: int,
) -> dict[str, bool]:
    """Return which contenders answer one case."""
    if not contenders:
        return {}
    device = input_device(model)
    context = torch.tensor(case.context, device=device)
    rest = torch.tensor([case.question + case.answer], device=device)
    caches = read_prompt(model, context, contenders) if prefill == "exact" else {}
    found = {}
    for name, compressor in contenders.items():
        with compressor.attached(model):
            if prefill == "exact":
                cache = caches.pop(name)
            else:
                cache = streaming_cache(compressor, model)
                for chunk in context[None].split(chunk_size, 1):
                    model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            found[name] = answered(model(rest, past_key_values=cache, use_cache=True).logits[0], case)
    return found


def retrieval_rows(cases: Sequence[Case], answered: Sequence[bool]) -> dict[str, Any]:
    """Return the share of each task's cases answered, with its Wilson interval, by length and depth, and by template."""
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
