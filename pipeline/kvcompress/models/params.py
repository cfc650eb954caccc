"""Section `model`: which model, and how it is loaded."""

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from kvcompress.core.errors import InputError
from kvcompress.core.packages import PackagedFile
from kvcompress.core.params import Name, Params, SectionParams


class PackagedModel(PackagedFile):
    name: Name  # what the model is called in reports


class HubModel(Params):
    id: Name
    revision: Name = "main"


class LocalModel(Params):
    path: Name


class ModelParams(SectionParams):
    """Which model, and how it is loaded. Only the block that `source` names is used."""

    section = "model"

    source: Literal["package", "hub", "local"]
    package: PackagedModel | None = None
    hub: HubModel | None = None
    local: LocalModel | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Name = "auto"  # auto, cpu, cuda, cuda:1 ...
    device_map: Name | None = None  # accelerate's placement for models larger than one device: auto, balanced ...
    tp_plan: Literal["auto"] | None = None  # transformers' own tensor parallelism, over all processes of the run
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def source_is_described(self) -> "ModelParams":
        if getattr(self, self.source) is None:
            raise ValueError(f"model.source is {self.source}, but there is no block model.{self.source}")
        return self


def source_of(model: str, revision: str, flag: str) -> dict[str, Any]:
    """Fields of `ModelParams` for a model on a command line: a folder, or a name on the hub.

    Raises `InputError` that names `flag` where it can be neither.
    """
    if Path(model).is_dir():
        return {"source": "local", "local": {"path": model}}
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise InputError(f"{flag} is {model!r}, but there is no such folder, and it is no name on the hub")
    return {"source": "hub", "hub": {"id": model, "revision": revision}}
