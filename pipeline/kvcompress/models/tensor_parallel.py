"""Tensor parallelism by transformers: each process computes a shard of every layer's heads.

transformers divides the projections in the order of the processes. Of a layer's H KV heads, process i of N computes
heads i H / N to (i + 1) H / N - 1, with the query heads that read them. Plans, classes and results number all heads of
the whole model; a cache holds those of its own process. The rest of the model is transformers' business.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.models import distributed
from kvcompress.models.architecture import Architecture
from kvcompress.models.params import ModelParams

# Names of the key projection in transformers' plans: alone, or interleaved by head with queries and values.
KEY_PROJECTIONS = ("k_proj", "query_key_value")


@dataclass(frozen=True)
class HeadShard:
    """Shard `index`, from 0, of `count` equal, contiguous shards of every layer's heads."""

    index: int = 0
    count: int = 1

    def own(self, heads: int) -> slice:
        """Return the slice of a layer's `heads` that belongs to this shard."""
        each = heads // self.count
        return slice(self.index * each, (self.index + 1) * each)


WHOLE = HeadShard()


def shard_of(config: Any) -> HeadShard:
    """Return this process's shard of the model with this transformers config; `WHOLE` unless it is split.

    Raises `UnsupportedModelError` for a split model that was not announced by `share`, and `InputError` if the run
    holds one split model and `config` is None.
    """
    if config is None:
        if distributed.one_model():
            raise InputError(
                "this process has only some of the model's heads: pass config=model.config, which says which"
            )
        return WHOLE
    count = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
    if count == 1:
        return WHOLE
    if not distributed.one_model():
        raise UnsupportedModelError(
            f"this {config.model_type} model is one of {count} tensor-parallel parts, none of which sees all heads:"
            " call kvcompress.models.tensor_parallel.share(model) in every process, or load it with model.tp_plan"
        )
    return HeadShard(distributed.rank(), distributed.size())


def gather_heads(own: Tensor, dim: int, config: Any) -> Tensor:
    """Gather the heads of all shards along `dim`, in the model's order: float64 on the CPU, in every process.

    Every process has to call this, with tensors of one shape. For a model that is not split, return `own` itself.
    """
    shard = shard_of(config)
    if shard.count == 1:
        return own
    own = own.movedim(dim, 0)
    whole = torch.zeros(own.shape[0] * shard.count, *own.shape[1:], dtype=torch.float64)
    whole[shard.own(whole.shape[0])] = own.to(whole)
    return distributed.add_up(whole).movedim(0, dim)


def sum_over_shards(own: Tensor, config: Any) -> Tensor:
    """Sum `own`, such as bytes, over all shards: float64 on the CPU, in every process. Every process has to call this.

    For a model that is not split, return `own` itself.
    """
    if shard_of(config).count == 1:
        return own
    return distributed.add_up(own.to("cpu", torch.float64, copy=True).contiguous())


def split_options(config: Any, params: ModelParams) -> dict[str, Any]:
    """Arguments of `from_pretrained` that split the model with this config among all processes of the run.

    Raises `InputError` for contradicting settings or a number of processes that does not fit, and
    `UnsupportedModelError` for a model that has no plan, or one that leaves heads whole.
    """
    from transformers.distributed import DistributedConfig

    setting, count = f"model.tp_plan is {params.tp_plan!r}", distributed.size()
    if params.device_map:
        raise InputError(f"{setting} and model.device_map is {params.device_map!r}: expected one of the two")
    if params.device != "auto":
        raise InputError(
            f"{setting}, which takes a GPU for every process itself, but model.device is {params.device!r}"
        )
    if count == 1:
        raise InputError(f"{setting}, which needs several processes: start them by torchrun or machine.processes")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.cuda.device_count()
    if torch.cuda.is_available() and here > gpus:
        raise InputError(f"{setting}, which needs a GPU for each of the {here} processes here, but there are {gpus}")
    require_split(config, count)
    return {"distributed_config": DistributedConfig(tp_size=count, tp_plan=params.tp_plan)}


def require_split(config: Any, count: int) -> None:
    """Raise `InputError` or `UnsupportedModelError` unless `count` processes get equal shares of the KV heads."""
    heads = Architecture.of_config(config).num_key_value_heads
    plan = getattr(config.get_text_config(decoder=True), "base_model_tp_plan", None) or {}
    styles = {style for rule, style in plan.items() if rule.rpartition(".")[2] in KEY_PROJECTIONS}
    if styles != {"colwise"}:
        reason = "leaves its heads whole in every process" if plan else "does not exist"
        raise UnsupportedModelError(
            f"transformers' plan to split {config.model_type} {reason}:"
            " spread whole layers instead, by model.device_map"
        )
    if heads % count:
        raise InputError(
            f"{config.model_type} has {heads} KV heads a layer, which {count} processes cannot share equally"
        )


def share(model: PreTrainedModel) -> None:
    """Announce to the processes of this run that each of them holds a shard of `model`.

    Needed after a direct call of `from_pretrained`; `load_folder` calls it by itself. Every process has to call it.
    From then on all of them work on every document, and statistics, prices and evaluations cover all heads. A short run
    proves the split. Raises `UnsupportedModelError` or `InputError` unless the shards are equal.
    """
    distributed.join()
    count = model.tp_size or 1
    if count == 1 or count != distributed.size():
        raise InputError(
            f"the model is in {count} tensor-parallel parts, but the run has {distributed.size()} processes:"
            " expected one part for each process"
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
    heads = Architecture.of_config(model.config).num_key_value_heads
    for index, layer in enumerate(out.past_key_values.layers):
        if layer.keys.shape[1] * count != heads:
            raise UnsupportedModelError(
                f"{name}: layer {index} has {layer.keys.shape[1]} of its {heads} KV heads in each of {count} processes"
            )
    if out.logits.shape[-1] != text.vocab_size:  # an output layer tied to an embedding that the plan leaves whole
        raise UnsupportedModelError(
            f"{name}, as transformers splits it, gives {out.logits.shape[-1]} logits for {text.vocab_size} tokens"
        )
