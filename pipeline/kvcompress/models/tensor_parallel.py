"""One model in several processes by transformers' own tensor parallelism: what loading takes, and what stands against it.

Only how attention is divided matters here: KV heads in equal, contiguous shares (`kvcompress.models.head_shards`). The rest of a model
is transformers' business.
"""

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.models import distributed
from kvcompress.models.architecture import ModelShape
from kvcompress.models.params import ModelParams

# What plans call the projection that makes keys, alone or, head by head, with queries and values.
KEY_PROJECTIONS = ("k_proj", "query_key_value")


def split_options(config: Any, params: ModelParams) -> dict[str, Any]:
    """What `from_pretrained` takes to split the model with this config among all processes of the run.

    Raises `InputError` for other settings of `params` or a number of processes that do not go with it, and
    `UnsupportedModelError` for a model whose plan, if any, leaves heads whole.
    """
    from transformers.distributed import DistributedConfig

    wanted, count = f"model.tp_plan is {params.tp_plan!r}", distributed.size()
    if params.device_map:
        raise InputError(f"{wanted} and model.device_map is {params.device_map!r}: expected one of the two")
    if params.device != "auto":
        raise InputError(f"{wanted}, which takes a GPU for every process itself, but model.device is {params.device!r}")
    if count == 1:
        raise InputError(f"{wanted}, which needs several processes: start them by torchrun or machine.processes")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.cuda.device_count()
    if torch.cuda.is_available() and here > gpus:
        raise InputError(f"{wanted}, which needs a GPU for each of the {here} processes here, but there are {gpus}")
    require_split(config, count)
    return {"distributed_config": DistributedConfig(tp_size=count, tp_plan=params.tp_plan)}


def require_split(config: Any, count: int) -> None:
    """Raise `InputError` or `UnsupportedModelError` unless `count` processes get equal shares of the KV heads."""
    heads = ModelShape.of_config(config).kv_heads
    plan = getattr(config.get_text_config(decoder=True), "base_model_tp_plan", None) or {}
    styles = {style for rule, style in plan.items() if rule.rpartition(".")[2] in KEY_PROJECTIONS}
    if styles != {"colwise"}:
        reason = "leaves its heads whole in every process" if plan else "does not exist"
        raise UnsupportedModelError(
            f"transformers' plan to split {config.model_type} {reason}: spread whole layers instead, by model.device_map"
        )
    if heads % count:
        raise InputError(
            f"{config.model_type} has {heads} KV heads a layer, which {count} processes cannot share equally"
        )


def share(model: PreTrainedModel) -> None:
    """Let the processes of this run know that they compute parts of `model`, which transformers split among them.

    Needed where `from_pretrained` was called directly (`load_folder` does it too); every process has to call this. From
    then on all of them work on every document, and statistics, prices and evaluations are of all heads. The proof is a
    short run. Raises `UnsupportedModelError` or `InputError` where the processes do not have equal shares of the heads.
    """
    distributed.join()
    count = model.tp_size or 1
    if count == 1 or count != distributed.size():
        raise InputError(
            f"the model is in {count} tensor-parallel parts, but the run has {distributed.size()} processes: expected a part each"
        )
    require_split(model.config, count)
    distributed.exchange_on(model.device)
    require_as_split(model, count)
    distributed.hold_one_model()


@torch.inference_mode()
def require_as_split(model: PreTrainedModel, count: int) -> None:
    """Raise `UnsupportedModelError` unless a pass gives each of `count` processes its KV heads and all logits."""
    name, text = type(model).__name__, model.config.get_text_config(decoder=True)
    try:
        out = model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=True)
    except RuntimeError as error:
        raise UnsupportedModelError(f"{name}, as transformers splits it, does not run: {str(error)[:200]}") from error
    heads = ModelShape.of_config(model.config).kv_heads
    for index, layer in enumerate(out.past_key_values.layers):
        if layer.keys.shape[1] * count != heads:
            raise UnsupportedModelError(
                f"{name}: layer {index} has {layer.keys.shape[1]} of its {heads} KV heads in each of {count} processes"
            )
    if out.logits.shape[-1] != text.vocab_size:  # a head tied to an embedding that the plan leaves whole
        raise UnsupportedModelError(
            f"{name}, as transformers splits it, gives {out.logits.shape[-1]} logits for {text.vocab_size} tokens"
        )
