"""Attention function that passes every layer's attention to a hook, with gradients on.

The output is that of transformers' own SDPA. A hook may return another output, to attribute a loss to heads, or
register itself on the gradient of the output, to price what a head would lose.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcompress.core.errors import UnsupportedModelError
from kvcompress.models.attention_interface import CAPPED_OR_LEARNED, refuse_terms, replaced_attention

NAME = "kvcompress_hook"


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer.

    query: `[batch, query_head, token, head_dim]`, the last tokens of the text.
    key, value: `[batch, kv_head, token, dim]`, the whole text.
    output: `[batch, token, query_head, value_dim]`.
    sliding_window: the model's own, None without one.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scaling: float
    sliding_window: int | None

    def detached(self) -> "LayerAttention":
        """Copy without gradients, for hooks on the gradient of the output, which would else keep the graph alive."""
        tensors = {name: getattr(self, name).detach() for name in ("query", "key", "value", "output")}
        return replace(self, **tensors)


AttentionHook = Callable[[LayerAttention], Tensor]  # returns the output that the model continues with

_hook: ContextVar[AttentionHook | None] = ContextVar("kvcompress_hook", default=None)


def hooked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function that transformers calls; works only inside `attention_hook`."""
    hook = _hook.get()
    if hook is None:
        raise UnsupportedModelError(f"attention {NAME!r} works only inside `with attention_hook(model, hook)`")
    refuse_terms(CAPPED_OR_LEARNED, kwargs, "the price of a head")
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
    )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    layer = cast(int, module.layer_idx)
    return hook(LayerAttention(layer, query, key, value, output, scaling, sliding_window)), None


AttentionInterface.register(NAME, hooked_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def attention_hook(model: PreTrainedModel, hook: AttentionHook) -> Iterator[None]:
    """Call `hook` at every layer's attention. Weights require no gradient meanwhile; everything is restored on exit.

    Raises `UnsupportedModelError` if the model's attention function cannot be replaced.
    """
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with replaced_attention(model, NAME):
        token = _hook.set(hook)
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            yield
        finally:
            for name, parameter in model.named_parameters():  # an offloaded model has other parameters than before
                if name in trainable and not parameter.is_inference():
                    parameter.requires_grad_(True)
            _hook.reset(token)
