"""What a shorter cache in one KV head costs when a fact is asked for: attribution over the question's tokens alone.

The context is read once, without gradients, into an ordinary cache. Then question and answer run through the model with
a gate on every KV head that moves its output from the full to the windowed one; integrated gradients (Sundararajan et
al. 2017, arXiv 1703.01365) along the gates, from 0 to 1 for all heads together, divide the change of the answer's loss
among the heads, and add up to it. Several facts share a context, and all nodes run as one batch.

What a head would lose that holds keys chosen at the end of the context, without the question, is read off the same
gradients, along the change of its output under that choice: to first order in that change, on the same path.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcompress.models.load import input_device
from kvcompress.models.rotary import Rotation
from kvcompress.sensitivity.attention_hook import listening
from kvcompress.sensitivity.selection_outputs import Choice, Chosen, chosen_at
from kvcompress.sensitivity.slot_outputs import slot_changes
from kvcompress.sensitivity.window_outputs import window_changes


class Choosers:
    """A listener that notes, layer by layer, what every choice takes at the end of the text it hears."""

    def __init__(self, choices: Sequence[Choice], sinks: int, rotation: Rotation | None) -> None:
        self.choices, self.sinks, self.rotation = choices, sinks, rotation
        self.chosen: dict[int, list[Chosen]] = {}

    def heard(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scaling: float, limit: int | None
    ) -> Tensor:
        text = query[0], key[0], value[0]
        self.chosen[layer] = chosen_at([key.shape[2]], self.choices, *text, self.sinks, scaling, self.rotation)
        return output


class Gates:
    """A listener that mixes full and windowed outputs; row i of the batch has its gates at node i.

    `lost` `[node, choice, layer, kv_head]` are the gradients along the changes of choices, once gradients have arrived.
    """

    def __init__(self, window: int, sinks: int, nodes: Tensor, layers: int, kv_heads: int, choosers: Choosers) -> None:
        self.window, self.sinks, self.choosers = window, sinks, choosers
        self.gates = nodes[:, None, None].repeat(1, layers, kv_heads).requires_grad_()  # [node, layer, kv_head]
        self.lost = torch.zeros(len(nodes), len(choosers.choices), layers, kv_heads, dtype=torch.float64)

    def heard(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scaling: float, limit: int | None
    ) -> Tensor:
        rows, kv_heads = key.shape[:2]
        # Rows of the batch count as KV heads.
        text = query.unflatten(1, (kv_heads, -1)).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
        changes, _ = window_changes(*text, [self.window], self.sinks, scaling, limit)
        gate = self.gates[:, layer].to(query.device)[:, :, None, None, None]
        moved = gate * changes[0].unflatten(0, (rows, kv_heads))
        output = output + moved.flatten(1, 2).transpose(1, 2).to(output.dtype)
        if self.choosers.choices:
            detached = text[0].detach(), text[1].detach(), text[2].detach()
            output.register_hook(lambda gradient: self.told(layer, *detached, gradient, scaling, limit))
        return output

    @torch.no_grad()
    def told(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scaling: float, limit: int | None
    ) -> None:
        """Note a layer's losses; gradient `[node, token, query_head, value_dim]`."""
        rows, choices = len(gradient), self.choosers.choices
        # All rows have read the same context.
        chosen = [
            Chosen(of.slots.repeat(rows, 1, 1), of.there.repeat(rows, 1, 1)) for of in self.choosers.chosen[layer]
        ]
        changes, _ = slot_changes(
            query, key, value, [], choices, chosen, query.shape[2], self.sinks, scaling, limit
        )  # [choice, node and kv_head, group, token, dim]
        along = gradient.transpose(1, 2).unflatten(1, (len(key) // rows, -1)).flatten(0, 1).float()
        lost = (changes * along).sum((2, 3, 4), dtype=torch.float64).unflatten(1, (rows, -1))
        self.lost[:, :, layer] = lost.transpose(0, 1).cpu()


def retrieval_prices(
    model: PreTrainedModel,
    context: Sequence[int],
    asked: Sequence[tuple[Sequence[int], Sequence[int]]],
    window: int,
    sinks: int,
    shape: tuple[int, int],
    nodes: int,
    choices: Sequence[Choice] = (),
    rotation: Rotation | None = None,
) -> Tensor:
    """`[fact, 1 + choice, layer, kv_head]`, nats a token of the answer: first what each head carries from beyond sinks and
    window, then what it would lose of that under every choice.

    `asked` are (question, answer) of facts in `context`, all token ids; `nodes` the points of Gauss-Legendre integration.
    Facts nearer than `window` lose nothing. Costs one pass over the context and `nodes` rows over question and answer.
    """
    found_at, weight = np.polynomial.legendre.leggauss(nodes)  # on [-1, 1]
    places, weights = torch.from_numpy(found_at + 1).float() / 2, torch.from_numpy(weight) / 2
    device = input_device(model)
    choosers = Choosers(choices, sinks, rotation)
    with torch.no_grad(), listening(model, choosers):
        past = DynamicCache()
        model(torch.tensor([context], device=device), past_key_values=past, use_cache=True, logits_to_keep=1)
    past.batch_repeat_interleave(nodes)
    found = []
    for question, answer in asked:
        tokens = torch.tensor([[*question, *answer]], device=device).expand(nodes, -1)
        gates = Gates(window, sinks, places, *shape, choosers)
        with listening(model, gates), torch.enable_grad():
            logits = model(tokens, past_key_values=past, use_cache=True).logits[:, -len(answer) - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, -len(answer) :], reduction="sum")
            (loss / len(answer)).backward()
        past.crop(-tokens.shape[1])
        for layer in past.layers:  # what is left of this question's graph
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        assert gates.gates.grad is not None
        every = torch.cat((gates.gates.grad.double()[:, None].cpu(), gates.lost), 1)
        found.append((every * weights[:, None, None, None]).sum(0))
    return torch.stack(found)
