"""Price of a smaller cache on text, for every KV head, window and select option, from one backward pass.

Let d(t, w) be the change of a head's attention output at token t when it keeps sinks and its last w keys, and g(t) the
gradient, with respect to that output, of the log-likelihood of tokens drawn from the model itself, one at each position.
To second order the divergence KL(full || windowed) is 1/2 d^T F d with the Fisher information F = E[g g^T]; with the
diagonal of F over tokens,

    price(w) = 1/2 sum_t (g(t) . d(t, w))^2 / tokens        nats a token

(Amari 1998's metric, used as in Fisher pruning, Theis et al. 2018, arXiv 1801.05787). All windows and options share one
forward and one backward pass: a layer's changes are computed when its gradient arrives, and then discarded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.collect.observer import block_size
from kvcompress.models.load import input_device
from kvcompress.models.rotary import Rotation
from kvcompress.sensitivity.attention_hook import LayerAttention, attention_hook
from kvcompress.sensitivity.prices import SelectOption
from kvcompress.sensitivity.selection_outputs import STEP, output_changes, selected_keys


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
        text = attention.query[0].detach(), attention.key[0].detach(), attention.value[0].detach()
        layer, scaling, sliding_window = attention.layer, attention.scaling, attention.sliding_window
        output.register_hook(lambda gradient: self.add(layer, *text, gradient[0], scaling, sliding_window))
        return output

    @torch.no_grad()
    def add(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gradient: Tensor,
        scaling: float,
        sliding_window: int | None,
    ) -> None:
        """Add a layer's sums; gradient `[token, query_head, value_dim]`."""
        heads, length, _ = query.shape
        kv_heads = key.shape[0]
        moments = range(0, length, STEP)
        selected = selected_keys(moments, self.options, query, key, value, self.sinks, scaling, self.rotation)
        query = query.unflatten(0, (kv_heads, -1))
        gradient = gradient.transpose(0, 1).unflatten(0, (kv_heads, -1)).float()
        total = torch.zeros(len(self.fisher), kv_heads, dtype=torch.float64, device=query.device)
        for start, stop in blocks(length, heads, query.device, bool(self.options)):
            block = query[:, :, start:stop], key[:, :stop], value[:, :stop]
            serving = [keys.serving(start, stop) for keys in selected]
            changes, _ = output_changes(
                *block, self.windows, self.sinks, scaling, sliding_window, self.options, serving
            )
            along = (changes * gradient[:, :, start:stop]).sum((2, 4))  # [window or option, kv_head, query]
            total += 0.5 * along.square().sum(-1, dtype=torch.float64)
        self.fisher[:, layer] += total.cpu()


def blocks(length: int, heads: int, device: torch.device, whole_steps: bool) -> Iterator[tuple[int, int]]:
    """Queries that are processed together, from `start` to `stop`; with `whole_steps`, `start` is a multiple of STEP."""
    start = 0
    while start < length:
        size = block_size(heads, start, device)
        stop = min(start + (max(size // STEP, 1) * STEP if whole_steps else size), length)
        yield start, stop
        start = stop


def text_prices(
    model: PreTrainedModel,
    tokens: Tensor,
    windows: Sequence[int],
    sinks: int,
    shape: tuple[int, int],
    seed: int,
    options: Sequence[SelectOption] = (),
    rotation: Rotation | None = None,
) -> Tensor:
    """Sums over one document's tokens, nats, float64 `[window or option, layer, kv_head]`.

    shape: layers and KV heads. rotation: the model's, for scores of `options` that look at vectors before rotation.
    """
    fisher = torch.zeros(len(windows) + len(options), *shape, dtype=torch.float64)
    with attention_hook(model, FisherHook(fisher, windows, sinks, options, rotation)), torch.enable_grad():
        logits = model(tokens[None].to(input_device(model)), use_cache=False).logits[0].float()
        generator = torch.Generator(device=logits.device).manual_seed(seed)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return fisher
