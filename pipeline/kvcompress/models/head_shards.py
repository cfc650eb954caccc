"""A model in parts: tensor parallelism, in which every process computes some of each layer's heads.

transformers divides the projections in the order of the processes: of a layer's H KV heads the i-th of N processes
computes H / N, from i H / N on, with the query heads that read them. Plans, classes and results speak of all heads, by
their numbers in the whole model; a cache holds those of its process.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.models import distributed


@dataclass(frozen=True)
class Part:
    """Part `index` of `count` equal ones, from 0."""

    index: int = 0
    count: int = 1

    def own(self, heads: int) -> slice:
        """Which of all `heads` of a layer are this part's."""
        each = heads // self.count
        return slice(self.index * each, (self.index + 1) * each)


WHOLE = Part()


def part_of(config: Any) -> Part:
    """Which part this process computes of the model with this config, where transformers notes that it was split.

    Raises `UnsupportedModelError` where the processes do not know of each other yet, and `InputError` for None in place
    of the config of a model that is split.
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
            f"this {config.model_type} model is one of {count} tensor-parallel parts, none of which sees all heads: call"
            " kvcompress.models.tensor_parallel.share(model) in every process, or load it with model.tp_plan"
        )
    return Part(distributed.rank(), distributed.size())


def of_all_heads(own: Tensor, dim: int, part: Part) -> Tensor:
    """The heads of one part along `dim` -> all heads in the model's order, float64 on the CPU, in every process.

    Every process has to call this, with tensors of one shape. Of a whole model it is the tensor itself.
    """
    if part.count == 1:
        return own
    own = own.movedim(dim, 0)
    whole = torch.zeros(own.shape[0] * part.count, *own.shape[1:], dtype=torch.float64)
    whole[part.own(whole.shape[0])] = own.to(whole)
    return distributed.add_up(whole).movedim(0, dim)


def over_parts(own: Tensor, part: Part) -> Tensor:
    """The sum over all parts, such as of bytes: float64 on the CPU, in every process; every one has to call this."""
    return own if part.count == 1 else distributed.add_up(own.to("cpu", torch.float64, copy=True).contiguous())
