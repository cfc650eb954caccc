"""Head statistics and their JSON file. Means are over all scored queries of all documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from kvcompress.core.artifacts import read_model, write_json
from kvcompress.core.errors import InputError
from kvcompress.core.head_classes import ClassificationFile, ModelInfo
from kvcompress.core.retention import require_each_once

NEAR = 64  # distances in relative_position_dist
TAIL_EDGES = (64, 128, 256, 512, 1024)  # relative_position_tail: [64, 128), [128, 256) ... [1024, end)
REGIONS = ("sink", "recent", "local", "global")

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
# Published sums exceed 1 by bfloat16 rounding.
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e-3, le=1.02)]
NotNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HeadStatistics:
    """Statistics of one query head.

    mean_entropy, std_entropy: attention entropy -sum p log p, over queries (nats).
    entropy_error, sink_error: standard errors of mean_entropy and sink_ratio (`collect.standard_errors`).
    normalized_entropy: entropy / log(visible keys), mean over queries that see at least two; 0 one key, 1 uniform.
    max_attention_mean: mean of each query's largest weight.
    position_preference: mean weight on `sink` (the first sink_size keys), `local` (the last local_window keys, the
        query's own included, sinks excluded), `global` (the rest; the three add up to 1) and `recent` (the last
        recent_ratio of the visible keys, at least one, whichever region they are in).
    induction_score: weight on the token after the first occurrence of a repeated random token (`collect.induction`).
    sink_ratio: position_preference["sink"].
    uniformity_score: KL divergence from attention to uniform, log(visible) - entropy (nats); 0 is uniform.
    relative_position_dist: mean weight at distances 0 ... 63 (0: the query's own key); it sums to 1 with
    relative_position_tail: mean weight at distances [64, 128), [128, 256), [256, 512), [512, 1024) and beyond.
    relative_without_sinks, tail_without_sinks: both distance profiles without the weight on the first 64 keys.
    """

    layer_idx: Annotated[int, Field(ge=0)]
    head_idx: Annotated[int, Field(ge=0)]
    mean_entropy: NotNegative
    std_entropy: NotNegative
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
    entropy_error: NotNegative | None = None
    sink_error: NotNegative | None = None

    def __post_init__(self) -> None:
        if set(self.position_preference) != set(REGIONS):
            raise ValueError(f"position_preference has {sorted(self.position_preference)}, expected {sorted(REGIONS)}")
        if abs(self.position_preference["sink"] - self.sink_ratio) > 1e-6:
            raise ValueError(f"sink_ratio is {self.sink_ratio}, position_preference {self.position_preference['sink']}")

    @property
    def local_ratio(self) -> float:
        return self.position_preference["local"]


class StatisticsFile(BaseModel):
    """`{"model_info": {...}, "head_statistics": [...]}`, with every head of the model once."""

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
    """Raise `InputError` unless `classes`, read from `path`, has the heads and the model of `statistics`."""
    info, other = statistics.model_info, classes.model_info
    rows = {(head.layer_idx, head.head_idx) for head in classes.classifications}
    if rows != info.head_indices:
        raise InputError(
            f"{path} has {len(rows)} heads, but the statistics are of {info.num_layers} layers x {info.num_heads} heads"
        )
    if other and (other.model_id, other.revision) != (info.model_id, info.revision):
        raise InputError(
            f"{path} is of model {other.model_id} ({other.revision}),"
            f" the statistics of {info.model_id} ({info.revision})"
        )


def save_statistics(path: str | Path, statistics: Sequence[HeadStatistics], model_info: ModelInfo) -> None:
    """Write a statistics file."""
    file = StatisticsFile(model_info=model_info, head_statistics=list(statistics))
    write_json(path, file.model_dump(mode="json", exclude_none=True))
