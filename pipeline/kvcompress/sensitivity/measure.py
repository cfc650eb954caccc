"""Prices of smaller caches in every KV head, measured once on calibration text.

Three measurements, each additive over documents: the price of one head's slots on text (`text_price`), the joint price
of a layer's heads (`joint_price`), and every head's part in the answers to questions about facts (`fact_price`). Slots
hold a window, or a window and keys that a score selected.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.collect.observer import require_observable
from kvcompress.core.errors import InputError
from kvcompress.models import distributed
from kvcompress.models.rotary import Rotation
from kvcompress.models.tensor_parallel import gather_heads, shard_of
from kvcompress.sensitivity.fact_price import calibration_facts, fact_prices
from kvcompress.sensitivity.joint_price import joint_prices
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.prices import SelectOption, Sensitivity
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

    Several processes (`kvcompress.models.distributed`) share the work; shards of one model measure their own heads.
    Each gets the whole result. Raises `UnsupportedModelError` for a model whose attention cannot be observed and
    `InputError` for texts that are too short.
    """
    settings = params or SensitivityParams()
    observed = require_observable(model)
    length = settings.max_tokens
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
    fact_length = min(settings.fact_tokens, length - 2 * settings.facts_per_context)
    contexts = calibration_facts(tokenizer, texts, fact_length, settings)
    sinks, far = settings.sinks, min(settings.far, windows[-1])
    options, rotation = select_options(model.config, settings, length)
    shard = shard_of(model.config)
    own = (observed.num_layers, observed.num_key_value_heads // shard.count)
    jobs: list[Callable[[], Tensor]] = []
    costs = []
    for tokens_of_text in documents.values():
        for i, tokens in enumerate(tokens_of_text):
            together = joint_windows if i < settings.joint_documents else []
            jobs.append(
                partial(document_prices, model, tokens, windows, together, sinks, own, settings.seed, options, rotation)
            )
            costs.append(3 + 2 * len(together))
    batch = len(jobs)
    for context, questions in contexts:
        jobs.append(partial(fact_prices, model, context, questions, far, sinks, own, settings.nodes, options, rotation))
        costs.append(1)
    found = [gather_heads(prices, -1, model.config).numpy() for prices in results(jobs, costs, progress)]
    kinds = len(windows) + len(options)
    text = np.asarray(sum(prices[:kinds] for prices in found[:batch]))
    joint = [prices[kinds:] for prices in found[:batch] if len(prices) > kinds]
    facts = np.concatenate(found[batch:])
    return Sensitivity(
        windows,
        sinks,
        length,
        length * batch,
        length * len(joint),
        text[: len(windows)],
        np.asarray(sum(joint)),
        facts[:, 0],
        {"texts": sorted(texts), "num_attention_heads": observed.num_attention_heads},
        options,
        text[len(windows) :],
        facts[:, 1:],
    )


def document_prices(
    model: PreTrainedModel,
    tokens: Tensor,
    windows: Sequence[int],
    joint_windows: Sequence[int],
    sinks: int,
    shape: tuple[int, int],
    seed: int,
    options: Sequence[SelectOption],
    rotation: Rotation | None,
) -> Tensor:
    """Sums over one document's tokens, nats, float64 `[window, option or joint window, layer, kv_head]`."""
    text, full = text_prices(model, tokens, windows, sinks, shape, seed, options, rotation)
    joint = [joint_prices(model, tokens, full, window, sinks, shape)[None] for window in joint_windows]
    return torch.cat((text, *joint))


def results(jobs: Sequence[Callable[[], Tensor]], costs: Sequence[int], progress: bool) -> list[Tensor]:
    """Results of all jobs in order. Processes share the jobs by their costs, in passes over a context."""
    own = distributed.mine(costs)
    with distributed.progress(sum(costs[i] for i in own), "price of heads", "pass", progress) as bar:
        found: dict[int, Tensor] = {}
        for i in own:
            found[i] = jobs[i]()
            bar.update(costs[i])
    return distributed.in_order(found, len(jobs))
