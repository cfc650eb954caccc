"""How a model comes to use another attention function, and what such a function must refuse."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from kvcompress.core.errors import UnsupportedModelError
from kvcompress.models.head_shards import part_of

# What some models' attention does beside softmax(QK)V: a learned sink, a learned bias by distance.
LEARNED_TERMS = ("s_aux", "position_bias")
CAPPED_OR_LEARNED = ("softcap", *LEARNED_TERMS)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch `model` to a registered attention; `UnsupportedModelError` where it does not take another one.

    Also where it is one of several tensor-parallel parts and nobody said so (`kvcompress.models.tensor_parallel.share`).
    """
    part_of(model.config)
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot use the attention {name!r}: {error}") from error
    if model.config._attn_implementation != name:
        raise UnsupportedModelError(
            f"the attention of {type(model).__name__} cannot be replaced: it does not go through transformers'"
            " attention interface"
        )


def refuse_terms(terms: tuple[str, ...], found: Mapping[str, Any], who: str) -> None:
    """Raise `UnsupportedModelError` where a layer passes one of `terms` to an attention that does not know it."""
    for term in terms:
        if found.get(term) is not None:
            raise UnsupportedModelError(f"{who} does not know the {term} that this model's attention uses")
