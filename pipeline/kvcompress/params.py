"""`params.yaml`: every dial of the pipeline, checked strictly. A stage reads the sections it declares and no others.

Unknown names, wrong types (also numbers written as strings), NaN and contradictions are `InputError`s that name the field.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvcompress.artifacts import read_text, validated
from kvcompress.errors import InputError

Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]


class Params(BaseModel):
    """Base of all sections: frozen, strict, nothing unknown, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class PackagedFile(Params):
    """A file inside a package of the Python package index, pinned by version and hash."""

    requirement: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    file: Name


class PackagedModel(PackagedFile):
    name: Name  # what the model is called in reports


class HubModel(Params):
    id: Name
    revision: Name = "main"


class LocalModel(Params):
    path: Name


class ModelParams(Params):
    """Which model, and how it is loaded. Only the block that `source` names is used."""

    source: Literal["package", "hub", "local"]
    package: PackagedModel | None = None
    hub: HubModel | None = None
    local: LocalModel | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Name = "auto"  # auto, cpu, cuda, cuda:1 ...
    device_map: Name | None = None  # accelerate's placement for models larger than one device: auto, balanced ...
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def source_is_described(self) -> "ModelParams":
        if getattr(self, self.source) is None:
            raise ValueError(f"model.source is {self.source}, but there is no block model.{self.source}")
        return self


class DatasetText(Params):
    """Text rows of a Hugging Face dataset, or of a folder that `datasets` can load; joined by blank lines."""

    path: Name
    name: Name | None = None
    revision: Name | None = None
    split: Name = "train"
    column: Name = "text"
    rows: Annotated[int, Field(ge=1)] = 1000


class TextParams(Params):
    """One named text. Its leading `calibration` share may be looked at; the rest is for evaluation alone."""

    source: Literal["package", "stdlib", "file", "dataset"]
    package: PackagedFile | None = None
    stdlib: Name | None = None  # a module of the standard library whose `topics` are the text
    file: Name | None = None
    dataset: DatasetText | None = None
    calibration: Share

    @model_validator(mode="after")
    def source_is_described(self) -> "TextParams":
        if getattr(self, self.source) is None:
            raise ValueError(f"source is {self.source}, but there is no {self.source} beside it")
        return self


class CorpusParams(Params):
    texts: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")], TextParams], Field(min_length=1)]

    @model_validator(mode="after")
    def both_uses(self) -> "CorpusParams":
        if all(text.calibration == 0 for text in self.texts.values()):
            raise ValueError("no text has a calibration share above 0")
        if all(text.calibration > 0 for text in self.texts.values()):
            raise ValueError("every text has a calibration share; at least one must be for evaluation only (share 0)")
        return self


class CollectParams(Params):
    """How calibration text is fed: `documents_per_text` documents of `max_tokens`, in chunks with a KV cache."""

    max_tokens: Annotated[int, Field(ge=128)] = 2048
    chunk_size: Annotated[int, Field(ge=1)] = 512
    documents_per_text: Annotated[int, Field(ge=1)] = 2


class StatisticsParams(Params):
    sink_size: Annotated[int, Field(ge=1)] = 4
    local_window: Annotated[int, Field(ge=1)] = 8
    recent_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1


class ThresholdParams(Params):
    """Bounds between the classes: entropies and `dead` in nats, `local` and `sink` as shares of attention."""

    low_entropy: Annotated[float, Field(gt=0)] = 1.5
    high_entropy: Annotated[float, Field(gt=0)] = 3.0
    local: Share = 0.6
    sink: Share = 0.3
    dead: Annotated[float, Field(ge=0)] = 0.1

    @model_validator(mode="after")
    def low_is_below_high(self) -> "ThresholdParams":
        if self.low_entropy >= self.high_entropy:
            raise ValueError(
                f"thresholds.low_entropy ({self.low_entropy}) must be below thresholds.high_entropy ({self.high_entropy})"
            )
        return self


class WindowParams(Params):
    """Window of each class, in tokens; `wide_below_local`: true_positional heads less local than this get the wide one."""

    sink_positional: Annotated[int, Field(ge=1)] = 8
    true_positional: Annotated[int, Field(ge=1)] = 8
    true_positional_wide: Annotated[int, Field(ge=1)] = 16
    wide_below_local: Share = 0.8
    sink_mixed_min: Annotated[int, Field(ge=1)] = 16
    sink_mixed_max: Annotated[int, Field(ge=1)] = 32

    @model_validator(mode="after")
    def min_is_not_above_max(self) -> "WindowParams":
        if self.sink_mixed_min > self.sink_mixed_max:
            raise ValueError(
                f"windows.sink_mixed_min ({self.sink_mixed_min}) is above windows.sink_mixed_max ({self.sink_mixed_max})"
            )
        return self


class AblationParams(Params):
    """What methods are compared on: documents of `max_tokens`, caches of `sizes` slots a head, facts to find.

    Retrieval asks for a fact at `retrieval_depths` places of contexts of `retrieval_lengths` tokens, `retrieval_per_depth`
    times for each task.
    """

    max_tokens: Annotated[int, Field(ge=64)] = 1024
    documents_per_text: Annotated[int, Field(ge=1)] = 2
    chunk_size: Annotated[int, Field(ge=1)] = 256
    sizes: Annotated[list[Annotated[int, Field(ge=16)]], Field(min_length=1)] = [64, 128, 256, 512]
    sink_counts: Annotated[list[Annotated[int, Field(ge=0, le=15)]], Field(min_length=1)] = [0, 1, 2, 4, 8]
    random_seeds: Annotated[int, Field(ge=1)] = 2
    retrieval_lengths: Annotated[list[Annotated[int, Field(ge=64)]], Field(min_length=1)] = [512, 1024]
    retrieval_depths: Annotated[int, Field(ge=1)] = 5
    retrieval_per_depth: Annotated[int, Field(ge=1)] = 1
    retrieval_prefill: Literal["exact", "streaming"] = "exact"


class PlotParams(Params):
    dpi: Annotated[int, Field(ge=50, le=600)] = 150


SECTIONS: dict[str, type[Params]] = {
    "model": ModelParams,
    "corpus": CorpusParams,
    "collect": CollectParams,
    "statistics": StatisticsParams,
    "thresholds": ThresholdParams,
    "windows": WindowParams,
    "ablation": AblationParams,
    "plots": PlotParams,
}

Section = TypeVar("Section", bound=Params)


def load_section(section: type[Section], path: str | Path = "params.yaml", **overrides: Any) -> Section:
    """Read one section of `params.yaml`; `overrides` that are not None replace its fields.

    Raises `InputError` where the file, a section's name, a field's name or a value is wrong.
    """
    name = next(key for key, value in SECTIONS.items() if value is section)
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no sections, expected {', '.join(SECTIONS)}")
    unknown = [str(key) for key in content if key not in SECTIONS]
    if unknown:
        raise InputError(f"{path}: there is no section {unknown[0]!r}, known are {', '.join(SECTIONS)}")
    if name not in content:
        raise InputError(f"{path}: the section {name!r} is missing")
    return override(validated(lambda: section.model_validate(content[name]), f"{path}: {name}"), **overrides)


def override(params: Section, **changes: Any) -> Section:
    """The same section with the fields in `changes` that are not None replaced, and checked again."""
    changes = {key: value for key, value in changes.items() if value is not None}
    return validated(lambda: type(params).model_validate({**params.model_dump(), **changes}), "command line")
