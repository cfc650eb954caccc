"""Where numbers were made: the machine and the versions of what ran."""

import platform

import torch
import transformers
from transformers import PreTrainedModel

from kvcompress.models.load import input_device


def environment(model: PreTrainedModel) -> dict[str, str | int]:
    device = input_device(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
