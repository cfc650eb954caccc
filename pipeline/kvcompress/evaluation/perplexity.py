"""Perplexity, next-token accuracy and divergence from the full cache, token by token, through the real cache.

Two protocols. *Streaming*: a document is fed in chunks and every query sees what its heads still hold. *Continuation*: the
first tokens of a document are read in one exact prefill and compressed, then the rest is fed in chunks.
Bytes are those of the cache that was read. The mask oracle of the tests gives the same numbers.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.errors import InputError
from kvcompress.core.retention import FULL
from kvcompress.evaluation.prefill import read_prompt
from kvcompress.evaluation.results import ResultStore, hash_of, settings_of
from kvcompress.methods.compressor import Compressor, PlanCompressor, UniformCompressor
from kvcompress.models import distributed
from kvcompress.models.load import input_device
from kvcompress.models.tensor_parallel import sum_over_shards

Documents = Mapping[str, Sequence[Tensor]]  # text -> documents, each 1-D token ids, all of one length

FULL_CACHE = "full cache"  # name of the contender that all others are compared with
MEASURES = ("nll", "correct", "same_top", "kl")  # of every predicted token


@dataclass
class QualityResult:
    """One contender on all documents.

    Parameters
    ----------
    texts: the text that each document is from.
    nll: negative log-likelihood of each predicted token, nats, `[document, token]`: tokens 1 ... T - 1, after a context
        from its second token on, because the first is predicted before anything is evicted.
    correct: 1 where the most likely token is the right one, `[document, token]`.
    same_top: 1 where the most likely token is that of the full cache, `[document, token]`.
    kl: divergence KL(full cache || this cache), nats, `[document, token]`.
    held: bytes held after each forward pass, `[document, pass]`: keys and values with slack, and what keys are selected
        by. Summed over the processes of a split model.
    nbytes_peak: the most bytes held at any time.
    seconds: time of the contender's own forward passes, summed over processes.
    """

    texts: list[str]
    nll: np.ndarray
    correct: np.ndarray
    same_top: np.ndarray
    kl: np.ndarray
    held: np.ndarray
    nbytes_peak: int
    seconds: float

    @property
    def nbytes_end(self) -> int:
        """Bytes held at the end of a document."""
        return int(self.held[-1, -1])

    @property
    def nbytes_mean(self) -> float:
        """Mean bytes held over the passes of a document."""
        return float(np.mean(self.held[-1]))

    def rows(self, text: str | None) -> list[int]:
        """Return the indices of a text's documents, None for all."""
        return [i for i, name in enumerate(self.texts) if text in (None, name)]

    def mean(self, measure: str, text: str | None = None, first: int = 0) -> float:
        """Return the mean of one of MEASURES over one text or all, from predicted token `first` of each document on."""
        return float(getattr(self, measure)[self.rows(text), first:].mean())

    def perplexity(self, text: str | None = None, first: int = 0) -> float:
        """Return exp of the mean NLL."""
        return float(np.exp(self.mean("nll", text, first)))

    def geometric_mean(self) -> float:
        """Return the geometric mean of the texts' perplexities, in which every text has the same weight."""
        return float(np.exp(np.mean([self.mean("nll", text) for text in dict.fromkeys(self.texts)])))


class Reference:
    """Predictions of the full cache: log-probabilities `[token, vocabulary]` and most likely tokens `[token]`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.log_probs: Tensor | None = None
        self.top: Tensor | None = None

    def record(self, first: int, log_probs: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the full cache's predictions from token `first` on; return `compare` of them with themselves."""
        if self.log_probs is None or self.top is None:
            self.log_probs = log_probs.new_empty(self.count, log_probs.shape[1])
            self.top = top.new_empty(self.count)
        self.log_probs[first : first + len(top)], self.top[first : first + len(top)] = log_probs, top
        return torch.ones(len(top)), torch.zeros(len(top))

    def compare(self, first: int, log_probs: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Return for predictions from token `first` on: 1 where the most likely token is the same, and KL, `[token]`."""
        assert self.log_probs is not None
        assert self.top is not None
        full = self.log_probs[first : first + len(top)]
        same = top == self.top[first : first + len(top)]
        return same.float().cpu(), (full.exp() * (full - log_probs)).sum(-1).cpu()


Compare = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def streaming_cache(compressor: Compressor, model: PreTrainedModel) -> RaggedCache:
    """Return an empty cache that never attends beyond what it holds.

    Methods that rank keys do so after every pass, and their passes attend in full.
    """
    if isinstance(compressor, PlanCompressor):
        return compressor.new_cache(model.config, prefill="streaming")
    return compressor.new_cache(model.config)


def score_document(
    model: PreTrainedModel, tokens: Tensor, cache: RaggedCache, chunk_size: int, compare: Compare | None = None
) -> tuple[Tensor, list[int]]:
    """Feed the tokens that the cache has not seen and score each prediction. The model must be attached.

    Returns MEASURES `[measure, token]` and the bytes held after each pass, an earlier prefill included. Without `compare`,
    a method of `Reference`, `same_top` and `kl` are NaN.
    """
    pieces, held = [], [cache.held_nbytes] if cache.seen else []
    tokens, first = tokens.to(input_device(model)), cache.seen
    for start in range(first, len(tokens), chunk_size):
        chunk = tokens[start : start + chunk_size]
        logits = model(chunk[None], past_key_values=cache, use_cache=True).logits[0]
        held.append(cache.held_nbytes)
        target = tokens[start + 1 : start + 1 + len(chunk)].to(logits.device)  # one fewer in the last chunk
        log_probs = torch.log_softmax(logits[: len(target)].float(), -1)
        top = log_probs.argmax(-1)
        same, kl = compare(start - first, log_probs, top) if compare else torch.full((2, len(top)), torch.nan)
        nll = -log_probs.gather(1, target[:, None])[:, 0]
        pieces.append(torch.stack([nll.cpu(), (top == target).float().cpu(), same, kl]))
    return torch.cat(pieces, 1).double(), held


def score_contenders(
    model: PreTrainedModel,
    documents: Documents,
    contenders: Mapping[str, Compressor],
    chunk_size: int = 256,
    rank_every: int = 64,
    progress: bool = True,
    context: int = 0,
    references: bool = True,
    store: ResultStore | None = None,
) -> dict[str, QualityResult]:
    """Score every contender on all documents.

    Parameters
    ----------
    chunk_size, rank_every: tokens a pass of plans, and of methods that rank keys after every pass.
    context: tokens of each document that are read in one exact prefill and not scored; 0 for streaming.
    references: compare with the full cache, which is read in any case then; if False, `same_top` and `kl` are NaN.
    store: results to reuse, and where new ones are kept.

    Documents are the outer loop, because the full cache's distributions (tokens x vocabulary floats) of one document fit
    in memory. Processes that share the work (`kvcompress.models.distributed`) read some documents each.
    Raises `InputError` if documents differ in length or have nothing to score.
    """
    batch = [(text, tokens) for text, found in documents.items() for tokens in found]
    if len({len(tokens) for _, tokens in batch}) != 1:
        raise InputError(f"documents to score must have one length, found {sorted({len(t) for _, t in batch})} tokens")
    length = len(batch[0][1])
    if not 0 <= context < length - 1:
        raise InputError(f"context is {context} tokens, expected 0 to {length - 2} of a document")
    if distributed.one_model():
        store = None  # each process counts the bytes of its own heads
    own = distributed.mine([length] * len(batch))
    sizes = {
        name: chunk_size if isinstance(one, PlanCompressor) else min(rank_every, chunk_size)
        for name, one in contenders.items()
    }
    records: dict[int, Tensor] = {}  # document and contender -> see `packed`
    label = f"after {context:,} tokens" if context else "streaming"
    total = len(own) * len(contenders)
    with torch.inference_mode(), distributed.progress(total, f"perplexity, {label}", "run", progress) as bar:
        for i in own:
            tokens, numbers = batch[i][1], dict(zip(contenders, count(i * len(contenders)), strict=False))
            how = ["quality", hash_of(tokens.tolist()), chunk_size, context, references]
            missing = dict(contenders)
            for name, one in contenders.items():
                known = store.get(settings_of(one), *how, sizes[name]) if store else None
                if known is not None:
                    records[numbers[name]] = torch.tensor(known, dtype=torch.float64)
                    del missing[name]
                    bar.update()
            for name, record in document_records(model, tokens, missing, sizes, context, references):
                if name in missing:
                    records[numbers[name]] = record
                    if store:
                        store.put(record.tolist(), settings_of(missing[name]), *how, sizes[name])
                    bar.update()
    found = distributed.in_order(records, len(batch) * len(contenders))
    texts = [text for text, _ in batch]
    return {name: result_of(texts, found[j :: len(contenders)], model) for j, name in enumerate(contenders)}


def document_records(
    model: PreTrainedModel,
    tokens: Tensor,
    contenders: Mapping[str, Compressor],
    sizes: Mapping[str, int],
    context: int,
    references: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Score contenders on one document; yield names and `packed` records.

    With `references` the full cache comes first, even if it is no contender.
    """
    if not contenders:
        return
    reference = Reference(len(tokens) - 1 - context)
    order = dict(contenders)
    if references:
        order = {FULL_CACHE: contenders.get(FULL_CACHE) or UniformCompressor(FULL), **order}
    caches = read_prompt(model, tokens[:context], order) if context else {}
    for name, compressor in order.items():
        start = time.perf_counter()
        compare = reference.record if name == FULL_CACHE else reference.compare
        with compressor.attached(model):
            cache = caches.pop(name) if context else streaming_cache(compressor, model)
            size = sizes.get(name, max(sizes.values()))
            measures, held = score_document(model, tokens, cache, size, compare if references else None)
        peak = cache.peak_nbytes + cache.evidence_nbytes  # the latter does not change once keys have been selected
        yield name, packed(measures, held, peak, time.perf_counter() - start)


def packed(measures: Tensor, held: Sequence[int], peak: int, seconds: float) -> Tensor:
    """Return a contender's measurement of one document as one float64 tensor."""
    return torch.cat([torch.tensor([seconds, len(held), peak, *held], dtype=torch.float64), measures.flatten()])


def result_of(texts: list[str], records: Sequence[Tensor], model: PreTrainedModel) -> QualityResult:
    """Return the result of one contender from the `packed` records of its documents."""
    passes = int(records[0][1])
    table = torch.stack(list(records))  # [document, ...]
    nbytes = sum_over_shards(table[:, 2 : 3 + passes].contiguous(), model.config).numpy()
    measures = table[:, 3 + passes :].view(len(texts), len(MEASURES), -1).numpy()
    arrays: dict[str, Any] = {name: measures[:, j] for j, name in enumerate(MEASURES)}
    peak, seconds = int(nbytes[:, 0].max()), float(table[:, 0].sum())
    return QualityResult(texts, **arrays, held=nbytes[:, 1:], nbytes_peak=peak, seconds=seconds)
