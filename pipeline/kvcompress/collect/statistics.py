"""Computes head statistics from attention sums, without a model."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvcompress.collect.params import StatisticsParams
from kvcompress.collect.standard_errors import standard_errors
from kvcompress.collect.sums import AttentionSums
from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import ModelInfo
from kvcompress.core.head_statistics import NEAR, TAIL_EDGES, HeadStatistics


def describe_measure(sums: AttentionSums, params: StatisticsParams, origin: Mapping[str, Any]) -> ModelInfo:
    """Return the `model_info` of statistics: shape from `sums`, measure from `params`, names from `origin`."""
    return ModelInfo(
        num_layers=sums.num_layers,
        num_heads=sums.num_heads,
        **params.model_dump(),
        documents=sums.documents,
        queries=int(sums.tensors["queries"][0]),
        max_tokens=sums.longest,
        **origin,
    )


def compute_statistics(sums: AttentionSums, params: StatisticsParams) -> list[HeadStatistics]:
    """Compute head statistics from attention sums, in order of layer and head.

    Raises `InputError` if the longest text is no longer than sinks and window together.
    """
    sinks, window = params.sink_size, params.local_window
    if sinks + window >= sums.longest:
        raise InputError(
            f"statistics.sink_size {sinks} and statistics.local_window {window} leave nothing between them: "
            f"the longest text has {sums.longest} tokens"
        )
    data = {name: tensor.numpy() for name, tensor in sums.tensors.items()}
    queries = data["queries"][:, None]  # [layer, 1]
    entropy = data["entropy"] / queries
    deviation = np.sqrt(np.clip(data["entropy_squared"] / queries - entropy**2, 0, None))
    normalized = data["normalized_entropy"] / np.maximum(data["varied_queries"], 1)[:, None]
    uniform = (data["log_visible"] / data["queries"])[:, None] - entropy
    relative = data["relative"] / queries[..., None]  # [layer, head, distance]
    near_sinks = sink_weight_nearby(data["early"], sinks) / queries[..., None]  # [layer, head, NEAR]
    sink = data["sinks"][..., :sinks].sum(-1) / queries
    local = relative[..., :window].sum(-1) - near_sinks[..., :window].sum(-1)
    recent = data["recent"][..., params.recent_percent - 1] / queries
    far = relative - data["relative_sinks"] / queries[..., None]
    beyond = data["relative_tail"] / queries
    beyond_sinks = (data["sinks"].sum(-1) - data["relative_sinks"].sum(-1)) / queries
    tail = tail_bins(relative, beyond)
    tail_far = tail_bins(far, beyond - beyond_sinks)
    entropy_error, sink_error = standard_errors(sums)
    induction = data["induction"] / np.maximum(data["probes"], 1)[:, None]

    def listed(values: np.ndarray) -> list[float]:
        return [float(value) for value in np.clip(values, 0, 1)]

    def one(i: int, j: int) -> HeadStatistics:
        parts = {"sink": sink[i, j], "recent": recent[i, j], "local": local[i, j]}
        parts["global"] = 1 - parts["sink"] - parts["local"]
        preference = dict(zip(parts, listed(np.array(list(parts.values()))), strict=True))
        return HeadStatistics(
            layer_idx=i,
            head_idx=j,
            mean_entropy=max(float(entropy[i, j]), 0.0),
            std_entropy=float(deviation[i, j]),
            max_attention_mean=float(data["max_weight"][i, j] / queries[i, 0]),
            position_preference=preference,
            sink_ratio=preference["sink"],
            uniformity_score=float(uniform[i, j]),
            relative_position_dist=listed(relative[i, j, :NEAR]),
            normalized_entropy=float(normalized[i, j]),
            relative_position_tail=listed(tail[i, j]),
            relative_without_sinks=listed(far[i, j, :NEAR]),
            tail_without_sinks=listed(tail_far[i, j]),
            induction_score=float(induction[i, j]) if data["probes"][i] else None,
            entropy_error=float(entropy_error[i, j]) if sums.documents > 1 else None,
            sink_error=float(sink_error[i, j, sinks - 1]) if sums.documents > 1 else None,
        )

    return [one(i, j) for i in range(sums.num_layers) for j in range(sums.num_heads)]


def sink_weight_nearby(early: np.ndarray, sinks: int) -> np.ndarray:
    """Sum `early` `[..., query, key]` over the first `sinks` keys at each distance below NEAR: `[..., NEAR]`.

    Only the first queries are near a sink, and `early` keeps them singly: query k + d sees key k at distance d.
    """
    distance = np.arange(NEAR)
    return sum((early[..., key + distance, key] for key in range(sinks)), np.zeros((*early.shape[:-2], NEAR)))


def tail_bins(relative: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """Sum `relative` `[..., distance]` into the bins of TAIL_EDGES, with `beyond` as the last bin: `[..., bin]`."""
    bins = [relative[..., low:high].sum(-1) for low, high in itertools.pairwise(TAIL_EDGES)]
    return np.stack([*bins, beyond], axis=-1)
