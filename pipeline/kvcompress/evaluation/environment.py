"""Machine, versions and code that numbers were made with."""

import platform
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from kvcompress.models.load import input_device

MEASURING = ("core", "models", "texts", "ops", "scores", "cache", "methods", "evaluation")  # packages behind a result


def environment(model: PreTrainedModel) -> dict[str, str | int]:
    """Return the device, CPU threads, precision, and versions of torch and transformers."""
    device = input_device(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@cache
def code_version() -> str:
    """Return the hash over all source files of the packages that a measured result depends on."""
    library, found = Path(__file__).parents[1], sha256()
    for path in sorted(path for package in MEASURING for path in (library / package).rglob("*.py")):
        found.update(f"{path.relative_to(library)}\n".encode() + path.read_bytes())
    return found.hexdigest()
