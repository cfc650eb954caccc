"""What a shorter cache costs in every KV head: measured once on calibration text, asked at any budget.

Three measurements, each additive over documents: the price of one head's slots on text (`text_price`), what a layer's
heads cost together (`joint_price`), and how much of a fact's answer every head carries (`retrieval_price`). Slots may be a
window, or a window and keys that a score chooses.
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
from kvcompress.sensitivity.calibration_facts import calibration_facts
from kvcompress.sensitivity.fact_price import retrieval_prices
from kvcompress.sensitivity.joint_price import joint_prices
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.prices import Sensitivity
from kvcompress.sensitivity.selection_outputs import priced_choices
from kvcompress.sensitivity.text_price import text_prices
from kvcompress.texts.corpora import documents_of_all


def measure_sensitivity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    params: SensitivityParams | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure on calibration `texts` (name -> text) what every KV head's windows cost.

    Where several processes were started (`kvcompress.models.distributed`), each measures its share (where they hold one model, its own
    heads) and gets the whole result. Raises
    `UnsupportedModelError` for a model whose attention cannot be observed, `InputError` for texts too short.
    """
    settings = params or SensitivityParams()
    observed = require_observable(model)
    shape, length = (observed.num_layers, observed.num_key_value_heads), settings.max_tokens
    if length > observed.max_context:
        raise InputError(f"sensitivity.max_tokens is {length}, but the model's context ends at {observed.max_context}")
    windows = [window for window in settings.windows if window + settings.sinks < length]
    joint_windows = [window for window in settings.joint_windows if window + settings.sinks < length]
    if not windows or not joint_windows:
        raise InputError(f"sensitivity: no window is shorter than a document of {length} tokens")
    of_text = documents_of_all(tokenizer, texts, length, settings.documents_per_text)
    batch = [tokens for found in of_text.values() for tokens in found]
    joint_batch = [tokens for found in of_text.values() for tokens in found[: settings.joint_documents]]
    fact_length = min(settings.fact_tokens, length - 2 * settings.facts_per_context)
    questions = calibration_facts(tokenizer, texts, fact_length, settings)
    sinks, far = settings.sinks, min(settings.far, windows[-1])
    choices, rotation = priced_choices(model.config, settings, length)
    shard = shard_of(model.config)
    own = (observed.num_layers, observed.num_key_value_heads // shard.count)
    jobs: list[Callable[[], Tensor]] = [
        partial(text_prices, model, tokens, windows, sinks, own, settings.seed, choices, rotation) for tokens in batch
    ]
    jobs += [
        partial(joint_prices, model, tokens, window, sinks, own) for tokens in joint_batch for window in joint_windows
    ]
    jobs += [
        partial(retrieval_prices, model, context, asked, far, sinks, own, settings.nodes, choices, rotation)
        for context, asked in questions
    ]
    found = [gather_heads(prices, -1, model.config).numpy() for prices in done_together(jobs, progress)]
    fisher, rest = found[: len(batch)], found[len(batch) :]
    joint, facts = rest[: -len(questions)], np.concatenate(rest[-len(questions) :])
    summed = np.asarray(sum(fisher))
    return Sensitivity(
        windows,
        sinks,
        length,
        sum(map(len, batch)),
        sum(map(len, joint_batch)),
        summed[: len(windows)],
        np.stack(joint).reshape(len(joint_batch), len(joint_windows), *shape).sum(0),
        facts[:, 0],
        {"texts": sorted(texts), "num_attention_heads": observed.num_attention_heads},
        choices,
        summed[len(windows) :],
        facts[:, 1:],
    )


def done_together(jobs: Sequence[Callable[[], Tensor]], progress: bool) -> list[Tensor]:
    """What every job gives, in their order; processes that share the work (`kvcompress.models.distributed`) do a share each.

    Processes take jobs in turns: those of one kind stand together and cost the same.
    """
    own = distributed.mine([1.0] * len(jobs))
    with distributed.progress(len(own), "price of heads", "pass", progress) as bar:
        found: dict[int, Tensor] = {}
        for i in own:
            found[i] = jobs[i]()
            bar.update()
    return distributed.in_order(found, len(jobs))
