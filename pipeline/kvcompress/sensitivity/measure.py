"""Prices of smaller caches in every KV head, measured once on calibration text.

Three measurements, each additive over documents: the price of one head's slots on text (`text_price`), the joint price of
a layer's heads (`joint_price`), and every head's part in the answers to questions about facts (`fact_price`). Slots hold a
window, or a window and keys that a score selected.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.collect.observer import require_observable
from kvcompress.core.errors import InputError
from kvcompress.models import distributed
from kvcompress.models.tensor_parallel import gather_heads, shard_of
from kvcompress.sensitivity.fact_price import calibration_facts, fact_prices
from kvcompress.sensitivity.joint_price import joint_prices
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.prices import Sensitivity
from kvcompress.sensitivity.selection_outputs import select_options
from kvcompress.sensitivity.text_price import text_prices
from kvcompress.texts.corpora import documents_of_all


def measure_sensitivity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    params: SensitivityParams | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Price every KV head on calibration `texts` (name -> text).

    Several processes (`kvcompress.models.distributed`) share the work; shards of one model measure their own heads. Each
    gets the whole result. Raises `UnsupportedModelError` for a model whose attention cannot be observed and `InputError`
    for texts that are too short.
    """
    settings = params or SensitivityParams()
    observed = require_observable(model)
    shape, length = (observed.num_layers, observed.num_key_value_heads), settings.max_tokens
    if length > observed.max_context:
        raise InputError(f"sensitivity.max_tokens is {length}, but the model's context ends at {observed.max_context}")
    windows = [window for window in settings.windows if window + settings.sinks < length]
    joint_windows = [window for window in settings.joint_windows if window + settings.sinks < length]
    if not windows or not joint_windows:
        raise InputError(
            "sensitivity.windows and sensitivity.joint_windows: no window is shorter than a document of"
            f" {length} tokens"
        )
    documents = documents_of_all(tokenizer, texts, length, settings.documents_per_text)
    batch = [tokens for found in documents.values() for tokens in found]
    joint_batch = [tokens for found in documents.values() for tokens in found[: settings.joint_documents]]
    fact_length = min(settings.fact_tokens, length - 2 * settings.facts_per_context)
    contexts = calibration_facts(tokenizer, texts, fact_length, settings)
    sinks, far = settings.sinks, min(settings.far, windows[-1])
    options, rotation = select_options(model.config, settings, length)
    shard = shard_of(model.config)
    own = (observed.num_layers, observed.num_key_value_heads // shard.count)
    jobs: list[Callable[[], Tensor]] = [
        partial(text_prices, model, tokens, windows, sinks, own, settings.seed, options, rotation) for tokens in batch
    ]
    jobs += [
        partial(joint_prices, model, tokens, window, sinks, own) for tokens in joint_batch for window in joint_windows
    ]
    jobs += [
        partial(fact_prices, model, context, questions, far, sinks, own, settings.nodes, options, rotation)
        for context, questions in contexts
    ]
    found = [gather_heads(prices, -1, model.config).numpy() for prices in results(jobs, progress)]
    text, rest = np.asarray(sum(found[: len(batch)])), found[len(batch) :]
    joint, facts = rest[: -len(contexts)], np.concatenate(rest[-len(contexts) :])
    return Sensitivity(
        windows,
        sinks,
        length,
        sum(map(len, batch)),
        sum(map(len, joint_batch)),
        text[: len(windows)],
        np.stack(joint).reshape(len(joint_batch), len(joint_windows), *shape).sum(0),
        facts[:, 0],
        {"texts": sorted(texts), "num_attention_heads": observed.num_attention_heads},
        options,
        text[len(windows) :],
        facts[:, 1:],
    )


def results(jobs: Sequence[Callable[[], Tensor]], progress: bool) -> list[Tensor]:
    """Results of all jobs in order. Processes that share the work take jobs in turn: neighbours cost the same."""
    own = distributed.mine([1.0] * len(jobs))
    with distributed.progress(len(own), "price of heads", "pass", progress) as bar:
        found: dict[int, Tensor] = {}
        for i in own:
            found[i] = jobs[i]()
            bar.update()
    return distributed.in_order(found, len(jobs))
