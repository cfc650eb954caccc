"""What a shorter cache costs in every KV head: measured once on calibration text, asked at any budget.

Three measurements, each additive over documents: the price of one head's slots on text (`text_price`), what a layer's
heads cost together (`joint_price`), and how much of a fact's answer every head carries (`retrieval_price`). Slots may be a
window, or a window and keys that a score chooses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.analysis.calibration_facts import calibration_facts
from kvcompress.analysis.choice_changes import Choice, priced_choices
from kvcompress.analysis.joint_price import joint_prices
from kvcompress.analysis.retrieval_price import retrieval_prices
from kvcompress.analysis.text_price import text_prices
from kvcompress.collect.observer import require_observable
from kvcompress.core.artifacts import read_tensors, write_tensors
from kvcompress.core.errors import InputError
from kvcompress.models import distributed
from kvcompress.models.head_shards import of_all_heads, part_of
from kvcompress.params.sensitivity import SensitivityParams
from kvcompress.texts.corpora import documents_of_all

SHRINK = 0.2  # how far a head's curve is drawn to the mean over heads: few documents measured it
TENSORS = {"fisher": 3, "joint": 3, "retrieval": 3, "chosen": 3, "lost": 4}  # name -> dimensions
HEADER = ("windows", "sinks", "context", "tokens", "joint_tokens", "origin", "choices")


@dataclass
class Sensitivity:
    """Sums over documents; a window w stands for `sinks` first and w last keys.

    fisher: `[window, layer, kv_head]`, nats. joint: `[joint window, layer, kv_head]`, nats. retrieval: `[fact, layer,
    kv_head]`, nats a token of the fact's answer. `tokens` and `joint_tokens` are what the sums are over, `context` the
    length of a document.

    `choices` are the ways to divide a head's slots between a window and chosen keys that were measured, for each score and
    part by size. chosen: `[choice, layer, kv_head]`, nats, as `fisher`. lost: `[fact, choice, layer, kv_head]`, what the
    head loses under it of what it carried, in the unit of `retrieval`.
    """

    windows: list[int]
    sinks: int
    context: int
    tokens: int
    joint_tokens: int
    fisher: np.ndarray
    joint: np.ndarray
    retrieval: np.ndarray
    origin: dict[str, Any]  # model_id, revision, num_attention_heads, texts, dtype
    choices: list[Choice]
    chosen: np.ndarray
    lost: np.ndarray

    @property
    def layers(self) -> int:
        return int(self.fisher.shape[1])

    @property
    def kv_heads(self) -> int:
        return int(self.fisher.shape[2])

    def prices(self) -> np.ndarray:
        """Expected cost of every window on text, nats a token: `[window, layer, kv_head]`, falling with the window.

        A head's own price, times what its layer's heads cost together over what they cost one by one (both summed over
        windows, scaled so that the sum over all heads stays), drawn by SHRINK to the mean over heads.
        """
        return self._priced(self.fisher)

    def choice_prices(self) -> np.ndarray:
        """The same of every choice, `[choice, layer, kv_head]`, falling with the size within a score and part."""
        found = np.zeros_like(self.chosen)
        for kind in dict.fromkeys(choice[:2] for choice in self.choices):
            of = [i for i, choice in enumerate(self.choices) if choice[:2] == kind]
            found[of] = self._priced(self.chosen[of])
        return found

    def _priced(self, fisher: np.ndarray) -> np.ndarray:
        single = fisher / self.tokens * self._rates()[:, None]
        priced = (1 - SHRINK) * single + SHRINK * single.mean((1, 2), keepdims=True)
        return np.maximum.accumulate(priced[::-1], 0)[::-1]

    def _rates(self) -> np.ndarray:
        """What a layer's heads cost together over what they cost alone, `[layer]`."""
        alone = (self.fisher / self.tokens).sum((0, 2))
        together = (self.joint / self.joint_tokens).clip(0).sum((0, 2))
        if together.sum() <= 0:
            return np.ones_like(alone)
        rate = np.divide(together, alone, out=np.zeros_like(alone), where=alone > 0)
        return np.asarray(rate * (alone.sum() / (alone * rate).sum()))

    def require_model(self, model_id: str, revision: str, path: str | Path) -> None:
        """Raise `InputError` where what stands in `path` was measured on another model."""
        if (self.origin.get("model_id"), self.origin.get("revision")) != (model_id, revision):
            raise InputError(f"{path} was measured on {self.origin.get('model_id')}, the model is {model_id}")

    def __add__(self, other: "Sensitivity") -> "Sensitivity":
        """Both sets of documents. Raises `InputError` where models, windows or choices differ."""
        mine, theirs = (
            (one.windows, one.sinks, one.fisher.shape, [tuple(choice) for choice in one.choices])
            for one in (self, other)
        )
        if mine != theirs:
            raise InputError(
                f"sensitivities measured with {mine} and {theirs} (windows, sinks, shape, choices) cannot be added"
            )
        return Sensitivity(
            self.windows,
            self.sinks,
            max(self.context, other.context),
            self.tokens + other.tokens,
            self.joint_tokens + other.joint_tokens,
            self.fisher + other.fisher,
            self.joint + other.joint,
            np.concatenate([self.retrieval, other.retrieval]),
            self.origin,
            self.choices,
            self.chosen + other.chosen,
            np.concatenate([self.lost, other.lost]),
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in TENSORS}
        write_tensors(path, tensors, {name: getattr(self, name) for name in HEADER})

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Read what `save` wrote. Raises `InputError` where the file is not complete or not finite."""
        tensors, header = read_tensors(path)
        if set(tensors) != set(TENSORS) or set(header) != set(HEADER):
            raise InputError(f"{path} does not hold the sensitivity of a model's heads; measure again")
        for name, tensor in tensors.items():
            if tensor.dim() != TENSORS[name] or tensor.shape[-2:] != tensors["fisher"].shape[-2:]:
                raise InputError(f"{path}: {name} has the shape {tuple(tensor.shape)}, not the model's heads")
            if not tensor.isfinite().all():
                raise InputError(f"{path}: {name} holds values that are not finite numbers")
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        choices = [Choice(*choice) for choice in header.pop("choices")]
        return cls(**header, choices=choices, **arrays)


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
    part = part_of(model.config)
    own = (observed.num_layers, observed.num_key_value_heads // part.count)
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
    found = [of_all_heads(prices, -1, part).numpy() for prices in done_together(jobs, progress)]
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
