"""Price of a smaller cache on text, for every KV head, window and select option, from one backward pass.

Let d(t, w) be the change of a head's attention output at token t when it keeps sinks and its last w keys, and g(t) the
gradient, with respect to that output, of the log-likelihood of tokens drawn from the model itself, one at each
position. To second order the divergence KL(full || windowed) is 1/2 d^T F d with the Fisher information F = E[g g^T];
with the diagonal of F over tokens,

    price(w) = 1/2 sum_t (g(t) . d(t, w))^2 / tokens        nats a token

(Amari 1998's metric, used as in Fisher pruning, Theis et al. 2018, arXiv 1801.05787). All windows and options share one
forward and one backward pass: a layer's changes are computed when its gradient arrives, and then discarded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from kvcompress.models.load import input_device
from kvcompress.models.rotary import Rotation
from kvcompress.sensitivity.attention_hook import LayerAttention, attention_hook
from kvcompress.sensitivity.prices import SelectOption
from kvcompress.sensitivity.selection_outputs import STEP, changes_along, selected_keys


@dataclass
class FisherHook:
    """Attention hook that sums (g . d)^2 / 2 over tokens into `fisher` `[window or option, layer, kv_head]`, nats."""

    fisher: Tensor
    windows: Sequence[int]
    sinks: int
    options: Sequence[SelectOption]
    rotation: Rotation | None

    def __call__(self, attention: LayerAttention) -> Tensor:
        output = attention.output
        if not output.requires_grad:  # the first layer: weights require no gradient, so the graph begins here
            output = output.detach().requires_grad_()
        text = attention.detached()
        output.register_hook(lambda gradient: self.add(text, gradient))
        return output

    @torch.no_grad()
    def add(self, attention: LayerAttention, gradient: Tensor) -> None:
        """Add a layer's sums; gradient `[1, token, query_head, value_dim]`."""
        query, key, value = attention.query[0], attention.key[0], attention.value[0]
        length = query.shape[1]
        moments = range(0, length, STEP)
        selected = selected_keys(moments, self.options, query, key, value, self.sinks, attention.scaling, self.rotation)
        # Whole steps: queries after the end have no gradient.
        more = -length % STEP
        query, key, value, gradient = (
            pad(tensor, (0, 0, 0, more)) for tensor in (query, key, value, gradient[0].transpose(0, 1))
        )
        query, gradient = (tensor.unflatten(0, (len(key), -1)) for tensor in (query, gradient))
        selected = pad(selected, (0, more))
        for moment, start in enumerate(moments):
            stop = start + STEP
            along = changes_along(
                gradient[:, :, start:stop],
                query[:, :, start:stop],
                key[:, :stop],
                value[:, :stop],
                self.windows,
                self.sinks,
                attention.scaling,
                attention.sliding_window,
                self.options,
                selected[:, :, moment, :stop],
            )
            self.fisher[:, attention.layer] += 0.5 * along.square().sum(-1, dtype=torch.float64).cpu()


def text_prices(
    model: PreTrainedModel,
    tokens: Tensor,
    windows: Sequence[int],
    sinks: int,
    shape: tuple[int, int],
    seed: int,
    options: Sequence[SelectOption] = (),
    rotation: Rotation | None = None,
) -> tuple[Tensor, Tensor]:
    """Prices of one document and the model's probabilities `[token, vocabulary]`.

    Prices are sums over tokens, nats, float64 `[window or option, layer, kv_head]`. shape: layers and KV heads.
    rotation: the model's, for scores of `options` that look at vectors before rotation.
    """
    fisher = torch.zeros(len(windows) + len(options), *shape, dtype=torch.float64)
    with attention_hook(model, FisherHook(fisher, windows, sinks, options, rotation)), torch.enable_grad():
        logits = model(tokens[None].to(input_device(model)), use_cache=False).logits[0]
        full = logits.detach().float().softmax(-1)
        generator = torch.Generator(device=full.device).manual_seed(seed)
        drawn = torch.multinomial(full, 1, generator=generator)
        gradient = full.scatter_add(1, drawn, torch.full_like(drawn, -1, dtype=full.dtype))  # of the cross-entropy
        logits.backward(gradient.to(logits.dtype))
    return fisher, full
