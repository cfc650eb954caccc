"""What a shorter cache in one KV head costs when a fact is asked for: attribution over the question's tokens alone.

The context is read once, without gradients, into an ordinary cache. Then question and answer run through the model with
a gate on every KV head that moves its output from the full to the windowed one; integrated gradients (Sundararajan et
al. 2017, arXiv 1703.01365) along the gates, from 0 to 1 for all heads together, divide the change of the answer's loss
among the heads, and add up to it. Several facts share a context, and all nodes run as one batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcompress.analysis.listen import listening
from kvcompress.analysis.window_changes import window_changes
from kvcompress.models import input_device


class Gates:
    """A listener that mixes full and windowed outputs; row i of the batch has its gates at node i."""

    def __init__(self, window: int, sinks: int, nodes: Tensor, layers: int, kv_heads: int) -> None:
        self.window, self.sinks = window, sinks
        self.gates = nodes[:, None, None].repeat(1, layers, kv_heads).requires_grad_()  # [node, layer, kv_head]

    def heard(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scaling: float, limit: int | None
    ) -> Tensor:
        rows, kv_heads = key.shape[:2]
        grouped = query.unflatten(1, (kv_heads, -1)).flatten(0, 1)  # rows of the batch count as KV heads
        changes, _ = window_changes(
            grouped, key.flatten(0, 1), value.flatten(0, 1), [self.window], self.sinks, scaling, limit
        )
        gate = self.gates[:, layer].to(query.device)[:, :, None, None, None]
        moved = gate * changes[0].unflatten(0, (rows, kv_heads))
        return output + moved.flatten(1, 2).transpose(1, 2).to(output.dtype)


def retrieval_prices(
    model: PreTrainedModel,
    context: Sequence[int],
    asked: Sequence[tuple[Sequence[int], Sequence[int]]],
    window: int,
    sinks: int,
    shape: tuple[int, int],
    nodes: int,
) -> Tensor:
    """`[fact, layer, kv_head]`: nats a token of the answer that each head carries from beyond sinks and window.

    `asked` are (question, answer) of facts in `context`, all token ids; `nodes` the points of Gauss-Legendre integration.
    Facts nearer than `window` lose nothing. Costs one pass over the context and `nodes` rows over question and answer.
    """
    found_at, weight = np.polynomial.legendre.leggauss(nodes)  # on [-1, 1]
    places, weights = torch.from_numpy(found_at + 1).float() / 2, torch.from_numpy(weight) / 2
    device = input_device(model)
    with torch.no_grad():
        past = DynamicCache()
        model(torch.tensor([context], device=device), past_key_values=past, use_cache=True, logits_to_keep=1)
    past.batch_repeat_interleave(nodes)
    found = []
    for question, answer in asked:
        tokens = torch.tensor([[*question, *answer]], device=device).expand(nodes, -1)
        gates = Gates(window, sinks, places, *shape)
        with listening(model, gates), torch.enable_grad():
            logits = model(tokens, past_key_values=past, use_cache=True).logits[:, -len(answer) - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, -len(answer) :], reduction="sum")
            (loss / len(answer)).backward()
        past.crop(-tokens.shape[1])
        for layer in past.layers:  # what is left of this question's graph
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        assert gates.gates.grad is not None
        found.append((gates.gates.grad.double() * weights[:, None, None]).sum(0))
    return torch.stack(found)
