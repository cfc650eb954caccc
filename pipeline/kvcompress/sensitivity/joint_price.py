"""What one window for all heads costs on text, and how much of it each head answers for.

Every head's output moves together from its full to its windowed one, o(a) = full + a (windowed - full), and the divergence
D(a) = KL(full || moved) grows from 0. Its integrated gradients along the way (Sundararajan et al. 2017, arXiv
1703.01365) divide D(1) among the heads; D is close to a quadratic, for which the gradient at a = 1/2 alone is exact. Single
heads' shares are noisy, also negative where heads make up for one another; summed over a layer they say what the layer's
heads cost together, which no price of a single head can say.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.models.load import input_device
from kvcompress.sensitivity.attention_hook import listening


class Halfway:
    """A listener that puts every head halfway between its full and its windowed output, behind a gate for each."""

    def __init__(self, window: int, sinks: int, layers: int, kv_heads: int) -> None:
        self.window, self.sinks = window, sinks
        self.gates = torch.full((layers, kv_heads), 0.5, requires_grad=True)

    def heard(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scaling: float, limit: int | None
    ) -> Tensor:
        length, group = query.shape[2], query.shape[1] // key.shape[1]
        place = torch.arange(length, device=query.device)
        distance = place[:, None] - place
        kept = (distance >= 0) & ((distance < self.window) | (place < self.sinks))
        if limit is not None:
            kept &= distance < limit
        windowed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=kept, scale=scaling, enable_gqa=group > 1
        ).transpose(1, 2)
        gate = self.gates[layer].to(output.device).repeat_interleave(group)[None, None, :, None]
        return output + gate.to(output.dtype) * (windowed - output)


def joint_prices(model: PreTrainedModel, tokens: Tensor, window: int, sinks: int, shape: tuple[int, int]) -> Tensor:
    """`[layer, kv_head]`: every head's part of the divergence of one document, nats summed over its tokens."""
    ids = tokens[None].to(input_device(model))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
    halfway = Halfway(window, sinks, *shape)
    with listening(model, halfway), torch.enable_grad():
        moved = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        torch.nn.functional.kl_div(moved, full, reduction="sum", log_target=True).backward()
    assert halfway.gates.grad is not None
    return halfway.gates.grad.double()
