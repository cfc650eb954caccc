"""Price on text of one window in all heads together, and each head's part of it.

The output of every head moves together from full to windowed, o(a) = full + a (windowed - full), and the divergence
D(a) = KL(full || moved) grows from 0. Integrated gradients along the path (Sundararajan et al. 2017, arXiv 1703.01365)
divide D(1) among the heads. D is close to a quadratic, for which the gradient at a = 1/2 alone is exact. The part of a
single head is noisy, and negative if other heads compensate for it. The sum over a layer is the joint price of its heads,
which prices of single heads do not contain.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.models.load import input_device
from kvcompress.sensitivity.attention_hook import LayerAttention, attention_hook


class HalfwayHook:
    """Attention hook that moves every head halfway from its full to its windowed output, through a gate for each head."""

    def __init__(self, window: int, sinks: int, layers: int, kv_heads: int) -> None:
        self.window, self.sinks = window, sinks
        self.gates = torch.full((layers, kv_heads), 0.5, requires_grad=True)

    def __call__(self, attention: LayerAttention) -> Tensor:
        query, key, output = attention.query, attention.key, attention.output
        length, group = query.shape[2], query.shape[1] // key.shape[1]
        place = torch.arange(length, device=query.device)
        distance = place[:, None] - place
        kept = (distance >= 0) & ((distance < self.window) | (place < self.sinks))
        if attention.sliding_window is not None:
            kept &= distance < attention.sliding_window
        windowed = torch.nn.functional.scaled_dot_product_attention(
            query, key, attention.value, attn_mask=kept, scale=attention.scaling, enable_gqa=group > 1
        ).transpose(1, 2)
        gate = self.gates[attention.layer].to(output.device).repeat_interleave(group)[None, None, :, None]
        return output + gate.to(output.dtype) * (windowed - output)


def joint_prices(model: PreTrainedModel, tokens: Tensor, window: int, sinks: int, shape: tuple[int, int]) -> Tensor:
    """Every head's part of one document's divergence, nats summed over tokens, float64 `[layer, kv_head]`."""
    ids = tokens[None].to(input_device(model))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
    halfway = HalfwayHook(window, sinks, *shape)
    with attention_hook(model, halfway), torch.enable_grad():
        moved = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        torch.nn.functional.kl_div(moved, full, reduction="sum", log_target=True).backward()
    assert halfway.gates.grad is not None
    return halfway.gates.grad.double()
