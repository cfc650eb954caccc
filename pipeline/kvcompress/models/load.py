"""Loads a resolved model and its tokenizer for inference: device, dtype, device map or tensor parallelism."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kvcompress.core.errors import InputError, one_line
from kvcompress.models import distributed
from kvcompress.models.params import ModelParams
from kvcompress.models.sources import ModelRecord, place_of, read_config
from kvcompress.models.tensor_parallel import share, split_options


def load_model(record: ModelRecord, params: ModelParams) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a resolved model and its tokenizer, placed as `params` say (`device`, `device_map` or `tp_plan`).

    Raises `InputError` for files that are missing or have changed since the model was resolved, or lack weights.
    """
    return load_folder(place_of(record, params.trust_remote_code), params)


def load_folder(folder: str | Path, params: ModelParams) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder of safetensors. Nothing is fetched and nothing unpickled."""
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": params.trust_remote_code, "local_files_only": True}
    device, placement = None, dict[str, Any]()
    if params.tp_plan:
        placement = split_options(read_config(Path(folder), params.trust_remote_code), params)
    elif params.device_map:
        if distributed.size() > 1:
            raise InputError(
                f"model.device_map is {params.device_map!r}, which needs one process, not {distributed.size()}"
            )
        placement = {"device_map": params.device_map}
    else:
        device = resolve_device(distributed.own_device(params.device))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, params.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **placement,
            **options,
        )
        if device is not None:
            model.to(device)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model folder {folder} cannot be loaded: {one_line(error)}") from error
    if device is not None:
        distributed.exchange_on(device)
    lacking = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if lacking:  # transformers would go on with random weights
        raise InputError(f"the weights in {folder} lack {lacking[0]}, or have it in another shape (of {len(lacking)})")
    if params.tp_plan:
        share(model)
    return model.eval(), tokenizer


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the first CUDA device if there is one, else the CPU.

    Raises `InputError` for a device that does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(1, device=name).cpu() if name == "meta" else torch.empty(1, device=name)
        return device.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"model.device is {name!r}, which is not there: {one_line(error)}") from error


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that takes token ids: that of the embedding, or where accelerate runs it if it is offloaded."""
    embedding = model.get_input_embeddings()
    if embedding.weight.device.type == "meta":  # offloaded: accelerate's hook knows the device
        return torch.device(embedding._hf_hook.execution_device)
    return embedding.weight.device
