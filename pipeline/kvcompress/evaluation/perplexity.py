"""Perplexity, next-token accuracy and KL to the full cache, token by token, through the real cache.

A document streams through the model in chunks; every query sees exactly what its heads still hold, so what is scored is
what a user gets, and the bytes are those of the cache that was read. Reading a document in one masked pass gives the
same (`tests.reference.oracle.judged`; a test holds the two together), where content decides with its choices recorded before.

A continuation is scored after an exact prefill: the context is read in one pass by the contender's own cache, so that
whoever chooses by queries has them, compressed once, and what follows goes on in the compressed cache.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.errors import InputError
from kvcompress.methods.compressor import Compressor, PlanCompressor
from kvcompress.models import distributed
from kvcompress.models.load import input_device
from kvcompress.models.tensor_parallel import sum_over_shards

Documents = Mapping[str, Sequence[Tensor]]  # text -> documents, each 1-D token ids, all of one length

MEASURES = ("nll", "correct", "kl")  # of every predicted token


@dataclass
class Score:
    """One contender on all documents; arrays are `[document, predicted token]`, for tokens 1 ... T - 1 of each, or from
    the second one after a context on.

    nll: negative log-likelihood, nats. correct: 1 where the most likely token was the right one. kl: divergence
    KL(full cache || this), nats. Bytes are those of K and V really held, slack counted, and of what a choice of keys goes
    by: at the end of a document, mean over the passes, and the most at any time; of a model split among processes the sum
    of what each of them holds. `seconds` is the time of all its
    forward passes.
    """

    texts: list[str]  # of each document
    nll: np.ndarray
    correct: np.ndarray
    kl: np.ndarray
    nbytes_end: int
    nbytes_mean: float
    nbytes_peak: int
    seconds: float

    def rows(self, text: str | None) -> list[int]:
        return [i for i, name in enumerate(self.texts) if text in (None, name)]

    def mean(self, what: str, text: str | None = None, first: int = 0) -> float:
        """Mean of `nll`, `correct` or `kl` over one text or all, from predicted token `first` of each document on."""
        return float(getattr(self, what)[self.rows(text), first:].mean())

    def perplexity(self, text: str | None = None, first: int = 0) -> float:
        """exp of the mean NLL."""
        return float(np.exp(self.mean("nll", text, first)))

    def geometric_mean(self) -> float:
        """Geometric mean of the texts' perplexities: every text counts the same."""
        return float(np.exp(np.mean([self.mean("nll", text) for text in dict.fromkeys(self.texts)])))


def streaming_cache(compressor: Compressor, model: PreTrainedModel) -> RaggedCache:
    """A cache that never attends beyond what it holds; a method that ranks keys ranks them after every pass."""
    if isinstance(compressor, PlanCompressor):
        return compressor.new_cache(model.config, prefill="streaming")
    return compressor.new_cache(model.config)


def full_log_probs(model: PreTrainedModel, tokens: Tensor, context: int = 0) -> Tensor:
    """Log-probabilities of the next token after each of `tokens` `[token]` with the whole past: `[token, vocabulary]`.

    Of the first `context` tokens there are none.
    """
    keep = len(tokens) - context
    logits = model(tokens[None].to(input_device(model)), use_cache=False, logits_to_keep=keep).logits[0]
    return torch.log_softmax(logits.float(), -1)


def score_document(
    model: PreTrainedModel, tokens: Tensor, reference: Tensor, cache: RaggedCache, chunk_size: int, context: int = 0
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Per-token nll, correct and kl of one document, and the bytes the cache held after each pass.

    `reference` are the `full_log_probs` of the same tokens and context. The model must be attached. The first `context`
    tokens are read in one pass and not scored.
    """
    pieces: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
    held = []
    tokens = tokens.to(reference.device)
    if context:
        model(tokens[None, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
        held.append(cache.held_nbytes)
    for start in range(context, len(tokens), chunk_size):
        chunk = tokens[start : start + chunk_size]
        logits = model(chunk[None], past_key_values=cache, use_cache=True).logits[0]
        held.append(cache.held_nbytes)
        target = tokens[start + 1 : start + 1 + len(chunk)]  # one fewer in the last chunk
        log_probs = torch.log_softmax(logits[: len(target)].float(), -1)
        full = reference[start - context : start - context + len(target)]
        pieces["nll"].append(-log_probs.gather(1, target[:, None])[:, 0])
        pieces["correct"].append((log_probs.argmax(-1) == target).float())
        pieces["kl"].append((full.exp() * (full - log_probs)).sum(-1))
    return {name: torch.cat(parts).double().cpu().numpy() for name, parts in pieces.items()}, held


def score_contenders(
    model: PreTrainedModel,
    documents: Documents,
    contenders: Mapping[str, Compressor],
    chunk_size: int = 256,
    rank_every: int = 64,
    progress: bool = True,
    context: int = 0,
) -> dict[str, Score]:
    """Every contender's `Score` on all documents, streaming prefill in chunks of `chunk_size` tokens.

    With `context` that many tokens of each are an exact prefill in one pass, and only what follows is scored.

    Methods that rank keys by content get `rank_every` tokens at a time: each of their passes sees itself in full.

    Documents are the outer loop, so that the full cache's distributions (`tokens x vocabulary` floats) exist for one at
    a time. Processes that share the work (`kvcompress.models.distributed`) read some documents each; `seconds` adds up over them.
    Raises `InputError` where documents differ in length or have nothing to score.
    """
    batch = [(text, tokens) for text, found in documents.items() for tokens in found]
    if len({len(tokens) for _, tokens in batch}) != 1:
        raise InputError(f"documents to score must have one length, found {sorted({len(t) for _, t in batch})} tokens")
    if any(not 0 <= context < len(tokens) - 1 for _, tokens in batch):
        raise InputError(f"context is {context} tokens, expected 0 to {len(batch[0][1]) - 2} of a document")
    own = distributed.mine([len(tokens) for _, tokens in batch])
    arrays: dict[int, Tensor] = {}  # document -> [contender, measure, predicted token]
    costs: dict[int, Tensor] = {}  # document -> [contender, (bytes at the end, mean and peak bytes, seconds)]
    total = len(own) * len(contenders)
    with torch.inference_mode(), distributed.progress(total, "perplexity", "run", progress) as bar:
        for i in own:
            tokens = batch[i][1]
            reference = full_log_probs(model, tokens, context)
            found, spent = [], []
            for compressor in contenders.values():
                size = chunk_size if isinstance(compressor, PlanCompressor) else min(rank_every, chunk_size)
                start = time.perf_counter()
                with compressor.attached(model):
                    cache = compressor.new_cache(model.config) if context else streaming_cache(compressor, model)
                    scored, held = score_document(model, tokens, reference, cache, size, context)
                seconds = time.perf_counter() - start
                found.append(np.stack([scored[name] for name in MEASURES]))
                peak = cache.peak_nbytes + cache.evidence_nbytes  # which stays as it is once there is any
                spent.append([held[-1], float(np.mean(held)), peak, seconds])
                bar.update()
            arrays[i] = torch.from_numpy(np.stack(found))
            costs[i] = torch.tensor(spent, dtype=torch.float64)
    whole = torch.stack(
        distributed.in_order(arrays, len(batch))
    ).numpy()  # [document, contender, measure, predicted token]
    costly = torch.stack(distributed.in_order(costs, len(batch)))
    costly[..., :3] = sum_over_shards(costly[..., :3], model.config)
    spending = costly.numpy()  # [document, contender, cost]
    texts = [text for text, _ in batch]
    return {
        name: Score(
            texts=texts,
            **{measure: whole[:, i, j] for j, measure in enumerate(MEASURES)},
            nbytes_end=int(spending[-1, i, 0]),
            nbytes_mean=float(spending[-1, i, 1]),
            nbytes_peak=int(spending[:, i, 2].max()),
            seconds=float(spending[:, i, 3].sum()),
        )
        for i, name in enumerate(contenders)
    }


def score_continuation(
    model: PreTrainedModel,
    documents: Documents,
    contenders: Mapping[str, Compressor],
    context: int,
    chunk_size: int = 64,
    progress: bool = True,
) -> dict[str, Score]:
    """Every contender's `Score` on what follows the first `context` tokens of all documents, after an exact prefill.

    The first token after the context is not scored: it is predicted before anything was forgotten, by all alike. The
    mean of bytes is over the compressed context and every `chunk_size` tokens after it. Raises `InputError`.
    """
    return score_contenders(model, documents, contenders, chunk_size, chunk_size, progress, context)
