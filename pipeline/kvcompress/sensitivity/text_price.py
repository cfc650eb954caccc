"""What a shorter cache in one KV head costs on text, for every head and window, from one backward pass.

Let d(t, w) be the change of a head's attention output at token t when it keeps sinks and its last w keys, and g(t) the
gradient, with respect to that output, of the log-likelihood of tokens drawn from the model itself, one at each place of
the text. To second order the divergence KL(full || windowed) is 1/2 d^T F d with the Fisher information F = E[g g^T];
with its diagonal over tokens, that is

    price(w) = 1/2 sum_t (g(t) . d(t, w))^2 / tokens        nats a token

(Amari 1998's metric, used as in Fisher pruning, Theis et al. 2018, arXiv 1801.05787). All windows share one forward and
one backward pass: when a layer's gradient arrives, its changes are computed and forgotten. So do divisions of a head's
slots between a window and keys chosen by content.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.collect.observer import block_size
from kvcompress.models.load import input_device
from kvcompress.models.rotary import Rotation
from kvcompress.sensitivity.attention_hook import listening
from kvcompress.sensitivity.selection_outputs import STEP, Choice, Chosen, chosen_at
from kvcompress.sensitivity.slot_outputs import slot_changes


class TextPrices:
    """A listener that adds up `fisher` `[window or choice, layer, kv_head]`: the sum over tokens of (g . d)^2 / 2, nats.

    Windows come first, then choices.
    """

    def __init__(
        self,
        windows: Sequence[int],
        sinks: int,
        layers: int,
        kv_heads: int,
        choices: Sequence[Choice] = (),
        rotation: Rotation | None = None,
    ) -> None:
        self.windows, self.sinks, self.choices, self.rotation = windows, sinks, choices, rotation
        self.fisher = torch.zeros(len(windows) + len(choices), layers, kv_heads, dtype=torch.float64)

    def heard(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scaling: float, limit: int | None
    ) -> Tensor:
        if not output.requires_grad:  # the first layer: weights ask for no gradient, so the graph begins here
            output = output.detach().requires_grad_()
        query, key, value = query.detach(), key.detach(), value.detach()
        output.register_hook(lambda gradient: self.told(layer, query[0], key[0], value[0], gradient[0], scaling, limit))
        return output

    @torch.no_grad()
    def told(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scaling: float, limit: int | None
    ) -> None:
        """Add a layer's prices; gradient `[token, query_head, value_dim]`."""
        heads, length, _ = query.shape
        kv_heads = key.shape[0]
        chosen = chosen_at(range(0, length, STEP), self.choices, query, key, value, self.sinks, scaling, self.rotation)
        query = query.unflatten(0, (kv_heads, -1))
        gradient = gradient.transpose(0, 1).unflatten(0, (kv_heads, -1)).float()
        total = torch.zeros(len(self.fisher), kv_heads, dtype=torch.float64, device=query.device)
        for start, stop in blocks(length, heads, query.device, bool(self.choices)):
            block = query[:, :, start:stop], key[:, :stop], value[:, :stop]
            there = [part(of, start, stop) for of in chosen]
            changes, _ = slot_changes(*block, self.windows, self.choices, there, STEP, self.sinks, scaling, limit)
            along = (changes * gradient[:, :, start:stop]).sum((2, 4))  # [window or choice, kv_head, query]
            total += 0.5 * along.square().sum(-1, dtype=torch.float64)
        self.fisher[:, layer] += total.cpu()


def blocks(length: int, heads: int, device: torch.device, stepped: bool) -> Iterator[tuple[int, int]]:
    """Queries that are read together, from `start` to `stop`; whole steps of STEP where choices are read with them."""
    start = 0
    while start < length:
        size = block_size(heads, start, device)
        stop = min(start + (max(size // STEP, 1) * STEP if stepped else size), length)
        yield start, stop
        start = stop


def part(chosen: Chosen, start: int, stop: int) -> Chosen:
    """The moments that serve the queries from `start`, a whole number of steps, to `stop`."""
    moments = slice(start // STEP, -(-stop // STEP))
    return Chosen(chosen.slots[:, moments], chosen.there[:, moments])


def text_prices(
    model: PreTrainedModel,
    tokens: Tensor,
    windows: Sequence[int],
    sinks: int,
    shape: tuple[int, int],
    seed: int,
    choices: Sequence[Choice] = (),
    rotation: Rotation | None = None,
) -> Tensor:
    """One document's `fisher` `[window or choice, layer, kv_head]`, summed over its tokens.

    `shape` is (layers, KV heads); `rotation` the model's, for scores of `choices` that look at vectors before it.
    """
    listener = TextPrices(windows, sinks, *shape, choices, rotation)
    with listening(model, listener), torch.enable_grad():
        logits = model(tokens[None].to(input_device(model)), use_cache=False).logits[0].float()
        generator = torch.Generator(device=logits.device).manual_seed(seed)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return listener.fisher
