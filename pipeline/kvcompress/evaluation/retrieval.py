"""Facts from far back: does a compressed cache still find them?

The context is read first and compressed without the question (exact prefill), or streamed together with it. A case
counts if greedy decoding gives exactly the answer: if the most likely token is right at every place of the answer, given
the right ones before it. That is the same, in one pass.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcompress.evaluation.perplexity import streaming_cache
from kvcompress.methods.compressor import Compressor
from kvcompress.models import distributed
from kvcompress.models.load import input_device
from kvcompress.texts.retrieval_tasks import Case


def answered(logits: Tensor, case: Case) -> bool:
    """Whether greedy decoding answers: `logits` `[token, vocabulary]` of question + answer (or more before them)."""
    places = logits[-len(case.answer) - 1 : -1]
    return places.argmax(-1).tolist() == case.answer


def retrieve(
    model: PreTrainedModel,
    cases: Sequence[Case],
    contenders: Mapping[str, Compressor],
    prefill: Literal["exact", "streaming"] = "exact",
    chunk_size: int = 256,
    progress: bool = True,
) -> dict[str, list[bool]]:
    """Which cases each contender answers.

    Exact prefill: the context is read once in full, and every contender compresses that cache before the question comes;
    one that chooses by queries, which no cache holds, reads the context itself.
    Streaming: every contender reads context and question in its own way from the start, `chunk_size` tokens at a time.
    Processes that share the work (`kvcompress.models.distributed`) ask some cases each.
    """
    own = distributed.mine([case.length for case in cases])
    found: dict[int, Tensor] = {}  # case -> [contender], 1 where it answers
    device = input_device(model)
    with torch.inference_mode(), distributed.progress(len(own), f"retrieval, {prefill}", "case", progress) as bar:
        for i in own:
            case, rights = cases[i], []
            context = torch.tensor([case.context], device=device)
            rest = torch.tensor([case.question + case.answer], device=device)
            full = DynamicCache(config=model.config)
            if prefill == "exact":
                model(context, past_key_values=full, use_cache=True, logits_to_keep=1)
            for compressor in contenders.values():
                with compressor.attached(model):
                    if prefill == "exact" and compressor.needs_queries:
                        cache = compressor.new_cache(model.config)
                        model(context, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    elif prefill == "exact":
                        cache = compressor.compress(full, config=model.config)
                    else:
                        cache = streaming_cache(compressor, model)
                        for chunk in context.split(chunk_size, 1):
                            model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    logits = model(rest, past_key_values=cache, use_cache=True).logits[0]
                rights.append(answered(logits, case))
            found[i] = torch.tensor(rights)
            bar.update()
    table = [[bool(right) for right in rights] for rights in distributed.in_order(found, len(cases))]
    return {name: [rights[j] for rights in table] for j, name in enumerate(contenders)}
