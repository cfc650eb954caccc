"""Head classes: the class of every query head, the classification file, and the look of a class in figures."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from kvcompress.core.artifacts import read_model, write_json
from kvcompress.core.retention import ALIAS_SCORE, ALIASES, Retention, Strategy, require_each_once


class HeadType(Enum):
    """Shape of a head's attention. The first-pass taxonomy alone has `positional`."""

    POSITIONAL = "positional"
    GATHERING = "gathering"
    DEAD = "dead"
    MIXED = "mixed"
    SINK_POSITIONAL = "sink_positional"
    TRUE_POSITIONAL = "true_positional"
    SINK_MIXED = "sink_mixed"


# class -> (colour, marker), in the order of every legend. Okabe and Ito's colours suit colour-blind readers.
CLASS_STYLE: dict[HeadType, tuple[str, str]] = {
    HeadType.SINK_POSITIONAL: ("#0072B2", "o"),
    HeadType.POSITIONAL: ("#0072B2", "p"),
    HeadType.TRUE_POSITIONAL: ("#CC79A7", "D"),
    HeadType.SINK_MIXED: ("#56B4E9", "s"),
    HeadType.GATHERING: ("#D55E00", "^"),
    HeadType.MIXED: ("#E69F00", "v"),
    HeadType.DEAD: ("#000000", "X"),
}
CLASS_LABELS = {kind: kind.value.replace("_", "-") for kind in HeadType}
# One letter for each class, so that a head map can be read without its colours.
CLASS_LETTERS = {
    HeadType.SINK_POSITIONAL: "s",
    HeadType.POSITIONAL: "p",
    HeadType.TRUE_POSITIONAL: "t",
    HeadType.SINK_MIXED: "x",
    HeadType.GATHERING: "G",
    HeadType.MIXED: "m",
    HeadType.DEAD: ".",
}


def _plain(strategy: Any) -> Any:
    return ALIASES.get(strategy, strategy) if isinstance(strategy, str) else strategy


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HeadClassification:
    """Class of one query head and the retention that the class table recommends for it.

    `confidence` is in [0, 1]. `recommended_window` counts keys (-1: unbounded, 0: none). `compression_strategy` is
    `sink_window`, `window_only`, `full`, `prune` or `select`; the published files' `none` is read as `full`, their
    `snapkv` as `select`. Only heads that select have `select_size`, and `score` unless it is SnapKV's.
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
    compression_strategy: Annotated[Strategy, BeforeValidator(_plain)] = "full"
    select_size: Annotated[int, Field(ge=0)] | None = None
    score: str | None = None

    def __post_init__(self) -> None:
        usual = ALIAS_SCORE if self.compression_strategy == "select" else ""
        sinks, chosen = self.sink_size if self.keep_sinks else 0, self.select_size or 0
        sizes = sinks, self.recommended_window, chosen
        object.__setattr__(
            self, "_retention", Retention.from_row(self.compression_strategy, *sizes, self.score or usual)
        )

    @property
    def retention(self) -> Retention:
        found: Retention = self._retention  # type: ignore[attr-defined]
        return found


class ModelInfo(BaseModel):
    """Model and measure that a file of head statistics or classes belongs to.

    The published files have the first five fields alone; for the others None means unknown.
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
    """`{"classifications": [...]}`; files of kvcompress also have `model_info` and `taxonomy`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    model_info: ModelInfo | None = None
    taxonomy: Literal["first_pass", "refined"] | None = None
    classifications: list[HeadClassification] = Field(min_length=1)

    @model_validator(mode="after")
    def every_head_once(self) -> "ClassificationFile":
        if self.model_info:
            expected = self.model_info.head_indices
        else:
            layers = 1 + max(head.layer_idx for head in self.classifications)
            width = 1 + max(head.head_idx for head in self.classifications)
            expected = {(i, j) for i in range(layers) for j in range(width)}
        require_each_once(((head.layer_idx, head.head_idx) for head in self.classifications), expected, "head")
        return self

    @property
    def ordered(self) -> list[HeadClassification]:
        """Rows in order of layer and head."""
        return sorted(self.classifications, key=lambda head: (head.layer_idx, head.head_idx))

    @property
    def layers(self) -> list[list[HeadClassification]]:
        """Rows as `[layer][query_head]`."""
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
    """Write a classification file."""
    file = ClassificationFile(model_info=model_info, taxonomy=taxonomy, classifications=list(classifications))
    write_json(path, file.model_dump(mode="json", exclude_none=True))
