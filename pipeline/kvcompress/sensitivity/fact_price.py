"""Part of every KV head in the answer to a question about a far fact: attribution over the question's tokens.

The context is read once, without gradients, into an ordinary cache. Question and answer then run through the model with
a gate on every KV head that moves its output from full to windowed. Integrated gradients (Sundararajan et al. 2017,
arXiv 1703.01365) along the gates, from 0 to 1 for all heads together, divide the change of the answer's loss among the
heads and add up to it. Several facts share a context, and all nodes of the integration run as one batch.

A head that holds keys selected at the end of the context, without the question, loses less. Its loss is read off the
same gradients along the change of its output under that selection: to first order in the change, on the same path.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvcompress.models.load import input_device
from kvcompress.models.rotary import Rotation
from kvcompress.sensitivity.attention_hook import LayerAttention, attention_hook
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.prices import SelectOption
from kvcompress.sensitivity.selection_outputs import changes_along, selected_keys
from kvcompress.sensitivity.window_outputs import moved_output
from kvcompress.texts.retrieval_tasks import TEMPLATES, CaseMaker

# Half of the contexts are prose, half repeat a few sentences: heads that find a fact in prose are not all that find one
# in repetitive text, and heads that find one wording are not all that find another. No sentence is one that evaluates.
FILLERS = (
    "Rain falls on the hills. The train leaves at noon. A door is closed. People walk home. So it goes on. ",
    "One two three four. The clock ticks on the wall. A dog sleeps. Water runs down the hill. ",
    "The sea is wide. Ships come and go. Nobody counts them. The wind blows again. Stars come out at night. ",
)
# (fact, question) in repetitive text, which says its number twice. The last three questions do not say that the answer
# is a number: other heads find that out.
TWICE = (
    (
        "The access code of {who} is {value}. Keep it in mind: {value} is the access code of {who}.",
        "Which code does {who} have? The access code of {who} is",
    ),
    (
        "The magic number of {who} is {value}. Do not forget it. {value} is the magic number of {who}.",
        "What is the magic number of {who}? The magic number of {who} is",
    ),
    (
        "The number of the safe of {who} is {value}. Memorize it. {value} opens the safe of {who}.",
        "What is the number of the safe of {who}? The number of the safe of {who} is",
    ),
    (
        "The watchword of {who} is {value}. Keep it ready: {value} is the watchword of {who}.",
        "Which watchword does {who} have? The watchword of {who} is",
    ),
    (
        "The secret of {who} is {value}. Tell nobody. {value} is the secret of {who}.",
        "What is the secret of {who}? The secret of {who} is",
    ),
    (
        "The label of {who} is {value}. Learn it by heart. {value} is the label of {who}.",
        "What is the label of {who}? The label of {who} is",
    ),
)

Questions = list[tuple[list[int], list[int]]]  # (question, answer), token ids


class CalibrationFacts(CaseMaker):
    """Makes facts in the calibration wordings in turn; with `twice` in those of repetitive text, always a number."""

    twice, turn = False, 0

    def statement(self, who: str) -> tuple[str, str, str]:
        number = self.twice or self.random.random() < 0.5
        value = self.number() if number else self.word()
        wordings: Sequence[tuple[str, str]] = TWICE if self.twice else TEMPLATES["calibration"]
        fact, question = wordings[self.turn % len(wordings)]
        self.turn += 1
        return fact.format(who=who, value=value), question, value


def calibration_facts(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], length: int, params: SensitivityParams
) -> list[tuple[list[int], Questions]]:
    """`params.fact_contexts` contexts of about `length` tokens with their questions, prose and repetitive text in turn.

    Raises `InputError` if a text is too short or a context cannot hold its facts.
    """
    maker = CalibrationFacts(tokenizer, params.seed, "calibration")
    prose = [maker.encode(text) for text in texts.values()]
    found = []
    for i in range(params.fact_contexts):
        turn = i // 2
        maker.twice, maker.turn = bool(i % 2), turn
        body = prose[turn % len(prose)]
        if maker.twice:  # the second round of wordings gets other fillers
            sentences = maker.encode(FILLERS[(turn + turn // len(TWICE)) % len(FILLERS)])
            body = sentences * (length // len(sentences) + 1)
        found.append(maker.needles(body, length, params.facts_per_context, params.far))
    return found


class SelectionHook:
    """Attention hook that records the keys that every option selects at the end of a text.

    selected: bool `[option, kv_head, key]` of every layer.
    """

    def __init__(self, options: Sequence[SelectOption], sinks: int, rotation: Rotation | None) -> None:
        self.options, self.sinks, self.rotation = options, sinks, rotation
        self.selected: dict[int, Tensor] = {}

    def __call__(self, attention: LayerAttention) -> Tensor:
        text = attention.query[0], attention.key[0], attention.value[0]
        self.selected[attention.layer] = selected_keys(
            [attention.key.shape[2]], self.options, *text, self.sinks, attention.scaling, self.rotation
        )[:, :, 0]
        return attention.output


class GateHook:
    """Attention hook that mixes full and windowed outputs; row i of the batch has its gates at node i.

    gates: `[node, layer, kv_head]`. lost: `[node, option, layer, kv_head]`, gradients along the changes of the options,
    complete after the backward pass.
    """

    def __init__(self, window: int, nodes: Tensor, layers: int, kv_heads: int, selection: SelectionHook) -> None:
        self.window, self.selection = window, selection
        self.gates = nodes[:, None, None].repeat(1, layers, kv_heads).requires_grad_()
        self.lost = torch.zeros(len(nodes), len(selection.options), layers, kv_heads, dtype=torch.float64)

    def __call__(self, attention: LayerAttention) -> Tensor:
        output = moved_output(attention, self.window, self.selection.sinks, self.gates[:, attention.layer])
        if self.selection.options:
            text = attention.detached()
            output.register_hook(lambda gradient: self.add(text, gradient))
        return output

    @torch.no_grad()
    def add(self, attention: LayerAttention, gradient: Tensor) -> None:
        """Set a layer's losses; gradient `[node, token, query_head, value_dim]`."""
        rows, kv_heads, keys = attention.key.shape[:3]
        # Rows of the batch count as KV heads. All have read the same context.
        selected = self.selection.selected[attention.layer]
        selected = pad(selected, (0, keys - selected.shape[-1])).repeat(1, rows, 1)
        along = changes_along(
            gradient.transpose(1, 2).unflatten(1, (kv_heads, -1)).flatten(0, 1),
            attention.query.unflatten(1, (kv_heads, -1)).flatten(0, 1),
            attention.key.flatten(0, 1),
            attention.value.flatten(0, 1),
            [],
            self.selection.sinks,
            attention.scaling,
            attention.sliding_window,
            self.selection.options,
            selected,
        )
        lost = along.sum(-1, dtype=torch.float64).unflatten(1, (rows, kv_heads))
        self.lost[:, :, attention.layer] = lost.transpose(0, 1).cpu()


def fact_prices(
    model: PreTrainedModel,
    context: Sequence[int],
    questions: Sequence[tuple[Sequence[int], Sequence[int]]],
    window: int,
    sinks: int,
    shape: tuple[int, int],
    nodes: int,
    options: Sequence[SelectOption] = (),
    rotation: Rotation | None = None,
) -> Tensor:
    """Nats a token of the answer, float64 `[fact, 1 + option, layer, kv_head]`.

    Entry 0 is what the head carries from beyond sinks and window, entry 1 + i what it loses of that under option i.
    Facts nearer than `window` lose nothing. The cost is one pass over the context and `nodes` rows over question and
    answer.

    questions: (question, answer) of the facts in `context`, all token ids. nodes: points of Gauss-Legendre integration.
    """
    points, weight = np.polynomial.legendre.leggauss(nodes)  # on [-1, 1]
    places, weights = torch.from_numpy(points + 1).float() / 2, torch.from_numpy(weight) / 2
    device = input_device(model)
    selection = SelectionHook(options, sinks, rotation)
    with torch.no_grad(), attention_hook(model, selection):
        past = DynamicCache()
        model(torch.tensor([context], device=device), past_key_values=past, use_cache=True, logits_to_keep=1)
    past.batch_repeat_interleave(nodes)
    found = []
    for question, answer in questions:
        tokens = torch.tensor([[*question, *answer]], device=device).expand(nodes, -1)
        gated = GateHook(window, places, *shape, selection)
        with attention_hook(model, gated), torch.enable_grad():
            logits = model(tokens, past_key_values=past, use_cache=True).logits[:, -len(answer) - 1 : -1].float()
            loss = cross_entropy(logits.transpose(1, 2), tokens[:, -len(answer) :], reduction="sum")
            (loss / len(answer)).backward()
        past.crop(-tokens.shape[1])
        for layer in past.layers:  # detach from this question's graph
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        assert gated.gates.grad is not None
        every = torch.cat((gated.gates.grad.double()[:, None].cpu(), gated.lost), 1)
        found.append((every * weights[:, None, None, None]).sum(0))
    return torch.stack(found)
