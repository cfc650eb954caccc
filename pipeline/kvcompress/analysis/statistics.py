"""Head statistics: what the attention sums say about each head, and the JSON file that holds them.

Computing them needs no model. Means are over all scored queries of all documents.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from kvcompress.analysis.attention_sums import AttentionSums
from kvcompress.analysis.precision import standard_errors
from kvcompress.core.artifacts import read_model, write_json
from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import ClassificationFile, ModelInfo
from kvcompress.core.retention import require_each_once
from kvcompress.params.analysis import StatisticsParams

NEAR = 64  # distances in relative_position_dist
TAIL_EDGES = (64, 128, 256, 512, 1024)  # relative_position_tail: [64, 128), [128, 256) ... [1024, end)
REGIONS = ("sink", "recent", "local", "global")

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[
    float, Field(strict=True, allow_inf_nan=False, ge=-1e-3, le=1.02)
]  # published sums exceed 1 by bf16 rounding


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HeadStatistics:
    """The statistics of one query head.

    mean_entropy, std_entropy: attention entropy -sum p log p over queries, nats.
    entropy_error, sink_error: standard errors of mean_entropy and sink_ratio over documents (`analysis.precision`).
    normalized_entropy: entropy / log(visible keys), mean over queries that see at least two; 0 one key, 1 uniform.
    max_attention_mean: mean of each query's largest weight.
    position_preference: mean weight on `sink` (the first sink_size keys), `local` (the last local_window keys, the
        query's own included, sinks excluded), `global` (the rest; the three add up to 1) and `recent` (the last
        recent_ratio of the visible keys, at least one, whatever else they are).
    induction_score: weight on the token after the first occurrence of a repeated random token (`analysis.induction`).
    sink_ratio: the same as position_preference["sink"].
    uniformity_score: KL divergence from attention to uniform, log(visible) - entropy, nats; 0 is uniform.
    relative_position_dist: mean weight at distances 0 ... 63 (0: the query's own key); it sums to 1 with
    relative_position_tail: mean weight at distances [64, 128), [128, 256), [256, 512), [512, 1024) and beyond.
    relative_without_sinks, tail_without_sinks: the same without the weight on the first 64 keys.
    """

    layer_idx: Annotated[int, Field(ge=0)]
    head_idx: Annotated[int, Field(ge=0)]
    mean_entropy: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
    std_entropy: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
    max_attention_mean: Share
    position_preference: dict[str, Share]
    sink_ratio: Share
    uniformity_score: Finite
    relative_position_dist: Annotated[list[Share], Field(min_length=1)]
    normalized_entropy: Share | None = None
    relative_position_tail: list[Share] | None = None
    relative_without_sinks: list[Share] | None = None
    tail_without_sinks: list[Share] | None = None
    induction_score: Share | None = None
    entropy_error: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)] | None = None
    sink_error: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)] | None = None

    def __post_init__(self) -> None:
        if set(self.position_preference) != set(REGIONS):
            raise ValueError(f"position_preference has {sorted(self.position_preference)}, expected {sorted(REGIONS)}")
        if abs(self.position_preference["sink"] - self.sink_ratio) > 1e-6:
            raise ValueError(f"sink_ratio is {self.sink_ratio}, position_preference {self.position_preference['sink']}")

    @property
    def local_ratio(self) -> float:
        return self.position_preference["local"]


class StatisticsFile(BaseModel):
    """`{"model_info": {...}, "head_statistics": [...]}`: every head of the model once."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    model_info: ModelInfo
    head_statistics: list[HeadStatistics]

    @field_validator("head_statistics", mode="after")
    @classmethod
    def in_order(cls, heads: list[HeadStatistics]) -> list[HeadStatistics]:
        return sorted(heads, key=lambda head: (head.layer_idx, head.head_idx))

    @model_validator(mode="after")
    def every_head_once(self) -> "StatisticsFile":
        found = ((head.layer_idx, head.head_idx) for head in self.head_statistics)
        require_each_once(found, self.model_info.head_indices, "head")
        return self


def load_statistics(path: str | Path) -> StatisticsFile:
    """Read a statistics file. Raises `InputError` that names the file and its first defect."""
    return read_model(path, StatisticsFile)


def require_same_model(statistics: StatisticsFile, classes: ClassificationFile, path: str | Path) -> None:
    """Raise `InputError` unless `classes`, read from `path`, speaks of the same heads of the same model."""
    info, other = statistics.model_info, classes.model_info
    rows = {(head.layer_idx, head.head_idx) for head in classes.classifications}
    if rows != info.head_indices:
        raise InputError(
            f"{path} has {len(rows)} heads, but the statistics are of {info.num_layers} layers x {info.num_heads} heads"
        )
    if other and (other.model_id, other.revision) != (info.model_id, info.revision):
        raise InputError(
            f"{path} is of model {other.model_id} ({other.revision}), the statistics of {info.model_id} ({info.revision})"
        )


def save_statistics(path: str | Path, statistics: Sequence[HeadStatistics], model_info: ModelInfo) -> None:
    """Write a statistics file in the seed's layout."""
    file = StatisticsFile(model_info=model_info, head_statistics=list(statistics))
    write_json(path, file.model_dump(mode="json", exclude_none=True))


def describe_measure(sums: AttentionSums, params: StatisticsParams, origin: Mapping[str, Any]) -> ModelInfo:
    """The `model_info` of statistics: shape and amount from the sums, the measure from `params`, names from `origin`."""
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
    """Head statistics from attention sums, in order of layer and head.

    Raises `InputError` where the longest text is no longer than sinks and window together.
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
    """Weight on the first `sinks` keys at each distance below NEAR: `early` `[..., query, key]` -> `[..., NEAR]`.

    Only the first queries are near a sink, so the singly kept ones answer exactly: query k + d sees key k at distance d.
    """
    distance = np.arange(NEAR)
    return sum((early[..., key + distance, key] for key in range(sinks)), np.zeros((*early.shape[:-2], NEAR)))


def tail_bins(relative: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """Weight by distance `[..., distance]` summed into the bins of TAIL_EDGES, with `beyond` as the last: `[..., bin]`."""
    bins = [relative[..., low:high].sum(-1) for low, high in itertools.pairwise(TAIL_EDGES)]
    return np.stack([*bins, beyond], axis=-1)
