"""Replaces a model's attention function through transformers' attention interface."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from kvcompress.core.errors import UnsupportedModelError
from kvcompress.models.tensor_parallel import shard_of

# Terms that some models' attention adds to softmax(QK)V: a learned sink, a learned bias by distance, a soft cap.
LEARNED_TERMS = ("s_aux", "position_bias")
CAPPED_OR_LEARNED = ("softcap", *LEARNED_TERMS)


@contextmanager
def replaced_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run `model` with the registered attention `name`; its own attention returns on exit and on any exception.

    Raises `UnsupportedModelError` as `use_attention` does.
    """
    before = model.config._attn_implementation
    use_attention(model, name)
    try:
        yield
    finally:
        use_attention(model, before)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch `model` to the registered attention `name`, for good.

    Raises `UnsupportedModelError` for a model whose attention cannot be replaced, and for one shard of a
    tensor-parallel model that was not announced by `kvcompress.models.tensor_parallel.share`.
    """
    shard_of(model.config)
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot use the attention {name!r}: {error}") from error
    if model.config._attn_implementation != name:
        raise UnsupportedModelError(
            f"the attention of {type(model).__name__} cannot be replaced: it does not go through transformers'"
            " attention interface"
        )


def refuse_terms(terms: tuple[str, ...], found: Mapping[str, Any], reader: str) -> None:
    """Raise `UnsupportedModelError` if a layer passes one of `terms` to an attention, `reader`, that ignores it."""
    for term in terms:
        if found.get(term) is not None:
            raise UnsupportedModelError(f"{reader} does not know the {term} that this model's attention uses")
