"""Price on text of one window in all heads together, and each head's part of it.

The output of every head moves together from full to windowed, o(a) = full + a (windowed - full), and the divergence
D(a) = KL(full || moved) grows from 0. Integrated gradients along the path (Sundararajan et al. 2017, arXiv 1703.01365)
divide D(1) among the heads. D is close to a quadratic, for which the gradient at a = 1/2 alone is exact. The part of a
single head is noisy, and negative if other heads compensate for it. The sum over a layer is the joint price of its
heads, which prices of single heads do not contain.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.models.load import input_device
from kvcompress.sensitivity.attention_hook import LayerAttention, attention_hook
from kvcompress.sensitivity.window_outputs import moved_output


class HalfwayHook:
    """Attention hook that moves every head, through a gate, halfway from its full to its windowed output."""

    def __init__(self, window: int, sinks: int, layers: int, kv_heads: int) -> None:
        self.window, self.sinks = window, sinks
        self.gates = torch.full((layers, kv_heads), 0.5, requires_grad=True)

    def __call__(self, attention: LayerAttention) -> Tensor:
        return moved_output(attention, self.window, self.sinks, self.gates[attention.layer][None])


def joint_prices(
    model: PreTrainedModel, tokens: Tensor, full: Tensor, window: int, sinks: int, shape: tuple[int, int]
) -> Tensor:
    """Every head's part of one document's divergence, nats summed over tokens, float64 `[layer, kv_head]`.

    full: probabilities of the model with the full cache, `[token, vocabulary]`. shape: layers and KV heads.
    """
    halfway = HalfwayHook(window, sinks, *shape)
    with attention_hook(model, halfway), torch.enable_grad():
        logits = model(tokens[None].to(input_device(model)), use_cache=False).logits[0]
        moved = logits.detach().float().softmax(-1)
        logits.backward(moved.sub_(full).to(logits.dtype))  # gradient of KL(full || moved)
    assert halfway.gates.grad is not None
    return halfway.gates.grad.double()
