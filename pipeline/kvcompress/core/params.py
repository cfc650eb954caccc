"""Base of the sections of `params.yaml`: strict schemas, reading one section, overriding fields by flags."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field

from kvcompress.core.artifacts import read_text, validated
from kvcompress.core.errors import InputError

SECTIONS = (
    "machine",
    "model",
    "corpus",
    "collect",
    "statistics",
    "thresholds",
    "windows",
    "sensitivity",
    "budgets",
    "ablation",
    "compare_plans",
    "benchmark",
    "plots",
)

Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class Params(BaseModel):
    """Base of all blocks: frozen, strict, without unknown fields or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class SectionParams(Params):
    """Base of the sections of `params.yaml`: `section` is its name there; an `optional` section may be left out."""

    section: ClassVar[str]
    optional: ClassVar[bool] = False


Section = TypeVar("Section", bound=SectionParams)


def load_section(section: type[Section], path: str | Path = "params.yaml", **overrides: Any) -> Section:
    """Read one section of `params.yaml`; `overrides` that are not None replace its fields.

    Raises `InputError` for an unreadable file, an unknown section or field, or a wrong value.
    """
    name = section.section
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} has no sections, expected {', '.join(SECTIONS)}")
    unknown = [str(key) for key in content if key not in SECTIONS]
    if unknown:
        raise InputError(f"{path}: there is no section {unknown[0]!r}, known are {', '.join(SECTIONS)}")
    if name not in content and not section.optional:
        raise InputError(f"{path}: the section {name!r} is missing")
    return override(validated(lambda: section.model_validate(content.get(name, {})), f"{path}: {name}"), **overrides)


def override(params: Section, **changes: Any) -> Section:
    """Return a copy of a section with the fields in `changes` that are not None replaced. Raises `InputError`."""
    changes = {key: value for key, value in changes.items() if value is not None}
    return validated(lambda: type(params).model_validate({**params.model_dump(), **changes}), "command line")
