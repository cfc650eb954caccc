"""Listening to a model's attention while gradients flow: a registered attention function that stays out of the way.

The output is what transformers' own SDPA gives. Who listens may change it, to attribute a loss to heads, or hook on to its
gradient, to price what a head would lose.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcompress.core.errors import UnsupportedModelError
from kvcompress.models.attention_interface import CAPPED_OR_LEARNED, refuse_terms, replaced_attention

NAME = "kvcompress_listen"


class Listener(Protocol):
    """What is called at every layer; shapes `[batch, head, token, dim]`, output `[batch, token, query_head, dim]`."""

    def heard(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scaling: float, limit: int | None
    ) -> Tensor:
        """The output that the model goes on with."""


_listener: ContextVar["Listener | None"] = ContextVar("kvcompress_listener", default=None)


def listened_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; needs `listening` around it."""
    listener = _listener.get()
    if listener is None:
        raise UnsupportedModelError(f"attention {NAME!r} works only inside `with listening(model, listener)`")
    refuse_terms(CAPPED_OR_LEARNED, kwargs, "the price of a head")
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
    )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer = cast(int, module.layer_idx)
    return listener.heard(layer, query, key, value, output, scaling, sliding_window), None


AttentionInterface.register(NAME, listened_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def listening(model: PreTrainedModel, listener: Listener) -> Iterator[None]:
    """Let `listener` hear the model's attention; weights ask for no gradient meanwhile. All is put back on exit.

    Raises `UnsupportedModelError` where the model does not take another attention function.
    """
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with replaced_attention(model, NAME):
        token = _listener.set(listener)
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            yield
        finally:
            for name, parameter in model.named_parameters():  # an offloaded model has others than before
                if name in trainable and not parameter.is_inference():
                    parameter.requires_grad_(True)
            _listener.reset(token)
