"""The classes of attention heads, and the classification file that names one class for every query head."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from kvcompress.core.artifacts import read_model, write_json
from kvcompress.core.retention import (
    ALIAS_SCORE,
    ALIASES,
    HeadCompressionConfig,
    Retention,
    Strategy,
    require_each_once,
)


class HeadType(Enum):
    """What a head's attention looks like; `positional` belongs to the first-pass taxonomy alone."""

    POSITIONAL = "positional"
    GATHERING = "gathering"
    DEAD = "dead"
    MIXED = "mixed"
    SINK_POSITIONAL = "sink_positional"
    TRUE_POSITIONAL = "true_positional"
    SINK_MIXED = "sink_mixed"


def _known_word(strategy: Any) -> Any:
    return ALIASES.get(strategy, strategy) if isinstance(strategy, str) else strategy


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HeadClassification:
    """The class of one query head and what the class table recommends for it.

    `confidence` is in [0, 1]; `recommended_window` counts keys (-1: no bound, 0: none); `compression_strategy` is one
    of `sink_window`, `window_only`, `full`, `prune`, `select` (the published files' `none` is read as `full`, `snapkv`
    as `select`). A head that selects names the number of keys and, unless it is SnapKV's, the score; all others leave
    `select_size` and `score` out.
    """

    layer_idx: Annotated[int, Field(ge=0)]
    head_idx: Annotated[int, Field(ge=0)]
    head_type: HeadType
    confidence: Annotated[float, Field(ge=0, le=1)]
    can_prune: bool = False
    can_limit_window: bool = False
    recommended_window: Annotated[int, Field(ge=-1)] = -1
    keep_sinks: bool = False
    sink_size: Annotated[int, Field(ge=0)] = 4
    use_full_cache: bool = True
    compression_strategy: Annotated[Strategy, BeforeValidator(_known_word)] = "full"
    select_size: Annotated[int, Field(ge=0)] | None = None
    score: str | None = None

    def __post_init__(self) -> None:
        self.config  # noqa: B018 (raises where strategy and window contradict)

    @property
    def config(self) -> HeadCompressionConfig:
        """The same wish in the words of a retention plan."""
        usual = ALIAS_SCORE if self.compression_strategy == "select" else ""
        return HeadCompressionConfig(
            self.layer_idx,
            self.head_idx,
            self.compression_strategy,
            self.keep_sinks,
            self.sink_size,
            self.recommended_window,
            self.select_size or 0,
            self.score or usual,
        )

    @property
    def retention(self) -> Retention:
        return self.config.retention


class ModelInfo(BaseModel):
    """Which model and which measure a file of head statistics or classes belongs to.

    The published files know the first five fields alone; the others default to "unknown".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    sink_size: int = Field(ge=1)
    local_window: int = Field(ge=1)
    recent_ratio: float = Field(gt=0, le=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    model_id: str | None = None
    revision: str | None = None
    documents: int | None = Field(default=None, ge=1)
    queries: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)

    @property
    def head_indices(self) -> set[tuple[int, int]]:
        return {(layer, head) for layer in range(self.num_layers) for head in range(self.num_heads)}


class ClassificationFile(BaseModel):
    """`{"classifications": [...]}`, with `model_info` and the taxonomy where kvcompress wrote it."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    model_info: ModelInfo | None = None
    taxonomy: Literal["first_pass", "refined"] | None = None
    classifications: list[HeadClassification] = Field(min_length=1)

    @model_validator(mode="after")
    def every_head_once(self) -> "ClassificationFile":
        if self.model_info:
            wanted = self.model_info.head_indices
        else:
            layers = 1 + max(head.layer_idx for head in self.classifications)
            width = 1 + max(head.head_idx for head in self.classifications)
            wanted = {(i, j) for i in range(layers) for j in range(width)}
        require_each_once(((head.layer_idx, head.head_idx) for head in self.classifications), wanted, "head")
        return self

    @property
    def ordered(self) -> list[HeadClassification]:
        """The rows in order of layer and head."""
        return sorted(self.classifications, key=lambda head: (head.layer_idx, head.head_idx))

    @property
    def layers(self) -> list[list[HeadClassification]]:
        """The rows as `[layer][query_head]`."""
        rows: dict[int, list[HeadClassification]] = {}
        for head in self.ordered:
            rows.setdefault(head.layer_idx, []).append(head)
        return list(rows.values())


def load_classifications(path: str | Path) -> ClassificationFile:
    """Read a classification file. Raises `InputError` that names the file and its first defect."""
    return read_model(path, ClassificationFile)


def save_classifications(
    path: str | Path,
    classifications: Sequence[HeadClassification],
    model_info: ModelInfo | None = None,
    taxonomy: Literal["first_pass", "refined"] | None = None,
) -> None:
    """Write a classification file in the seed's layout."""
    file = ClassificationFile(model_info=model_info, taxonomy=taxonomy, classifications=list(classifications))
    write_json(path, file.model_dump(mode="json", exclude_none=True))
