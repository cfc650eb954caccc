"""Sections `model` (the model and its loading) and `machine` (number of processes). Importing this loads no torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from kvcompress.core.errors import InputError
from kvcompress.core.packages import PackagedFile
from kvcompress.core.params import Count, Name, Params, SectionParams


class PackagedModel(PackagedFile):
    """A GGUF model inside a package of the Python package index."""

    name: Name  # the model's name in reports


class HubModel(Params):
    """A model on the Hugging Face hub."""

    id: Name
    revision: Name = "main"


class LocalModel(Params):
    """A model folder on this machine."""

    path: Name


class ModelParams(SectionParams):
    """The model and how it is loaded. Only the block named by `source` is used.

    device: `auto` (the first GPU, else the CPU), `cpu`, `cuda`, `cuda:1` ... [default: auto].
    device_map: placement by accelerate for models larger than a device, such as `auto` or `balanced` [default: none].
    tp_plan: `auto` splits the model among all processes of the run by transformers' tensor parallelism [default: none].
    """

    section = "model"

    source: Literal["package", "hub", "local"]
    package: PackagedModel | None = None
    hub: HubModel | None = None
    local: LocalModel | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Name = "auto"
    device_map: Name | None = None
    tp_plan: Literal["auto"] | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def source_is_described(self) -> "ModelParams":
        if getattr(self, self.source) is None:
            raise ValueError(f"model.source is {self.source}, but the block model.{self.source} is missing")
        return self


class MachineParams(SectionParams):
    """Number of processes that share the documents of a stage, or `gpus` for one on each GPU [default: 1].

    No stage depends on this section, because no result does. The section may be left out.
    """

    section = "machine"
    optional = True

    processes: Count | Literal["gpus"] = 1

    @property
    def count(self) -> int:
        """Processes on this machine, at least 1."""
        if self.processes != "gpus":
            return self.processes
        import torch

        return max(1, torch.cuda.device_count())


def source_of(model: str, revision: str, flag: str) -> dict[str, Any]:
    """Fields of `ModelParams` for a model named on a command line: a folder, or a name on the hub.

    Raises `InputError` that names `flag` if `model` can be neither.
    """
    if Path(model).is_dir():
        return {"source": "local", "local": {"path": model}}
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise InputError(f"{flag} is {model!r}, which is neither an existing folder nor a name on the hub")
    return {"source": "hub", "hub": {"id": model, "revision": revision}}
