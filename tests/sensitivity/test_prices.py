"""Prices of heads against slow references: masked softmax, one gradient at a time, finite differences."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress.core.errors import UnsupportedModelError
from kvcompress.core.retention import FULL, Retention
from kvcompress.sensitivity.attention_hook import LayerAttention, attention_hook
from kvcompress.sensitivity.fact_price import fact_prices
from kvcompress.sensitivity.joint_price import HalfwayHook, joint_prices
from kvcompress.sensitivity.selection_outputs import changes_along
from kvcompress.sensitivity.text_price import text_prices
from kvcompress.sensitivity.window_outputs import windowed_output
from tests.reference.oracle import judged
from tests.tiny import tiny_model

SHAPES = {"gpt_neox": (2, 4), "llama": (2, 2), "qwen3": (2, 2), "gpt2": (2, 4), "mistral": (2, 2), "phi": (2, 4)}
WINDOWS, SINKS = [3, 8, 20, 64], 2


def tokens(count: int = 60) -> Tensor:
    return torch.randint(1, 256, (count,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("limit", [None, 12])
def test_windows_are_those_of_a_masked_softmax(limit: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 20, 8), torch.randn(2, 50, 8), torch.randn(2, 50, 5)
    gradient = torch.randn(2, 3, 20, 5)
    along = changes_along(gradient, query, key, value, WINDOWS, SINKS, 0.3, limit)
    position, place = torch.arange(30, 50)[:, None], torch.arange(50)
    scores = torch.einsum("hgqd,hkd->hgqk", query, key) * 0.3
    seen = (place <= position) if limit is None else (place <= position) & (place > position - limit)
    full = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[:, None]
    for i, window in enumerate(WINDOWS):
        kept = seen & ((place < SINKS) | (place > position - window))
        expected = scores.masked_fill(~kept, -torch.inf).softmax(-1) @ value[:, None]
        batch = query.flatten(0, 1)[None], key[None], value[None]
        found = windowed_output(*batch, window, SINKS, 0.3, limit)
        assert torch.allclose(found[0], expected.flatten(0, 1), atol=1e-5)
        assert torch.allclose(along[i], ((expected - full) * gradient).sum((1, 3)), atol=1e-4)


def test_a_windowed_output_reads_long_texts_in_blocks() -> None:
    query, key, value = torch.randn(3, 1, 2, 300, 8, generator=torch.Generator().manual_seed(1))
    place = torch.arange(300)
    seen = (place <= place[:, None]) & ((place < SINKS) | (place > place[:, None] - 40))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3)
    assert torch.allclose(windowed_output(query, key, value, 40, SINKS, 0.3), expected, atol=1e-5)


class Remember:
    """Keeps every layer's output, alive in the graph."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def __call__(self, attention: LayerAttention) -> Tensor:
        output = attention.output
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self.outputs.append(output)
        return output


@pytest.mark.parametrize("name", SHAPES)
def test_text_price_is_half_the_squared_gradient_along_the_change(name: str) -> None:
    model, ids = tiny_model(name), tokens()
    layers, kv_heads = SHAPES[name]
    found, _ = text_prices(model, ids, WINDOWS, SINKS, (layers, kv_heads), seed=5)
    remember = Remember()
    with attention_hook(model, remember):
        logits = model(ids[None], use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(5))[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        gradients = torch.autograd.grad(loss, remember.outputs)
    first = FirstLayer(model)
    for window_index, window in enumerate(WINDOWS):
        change = first.windowed(ids, Retention(SINKS, window)) - remember.outputs[0].detach()
        along = (gradients[0] * change)[0].unflatten(1, (kv_heads, -1)).sum((2, 3))  # [token, kv_head]
        expected = 0.5 * along.double().square().sum(0)
        assert torch.allclose(found[window_index, 0], expected, rtol=2e-3, atol=1e-7)
    assert (found[:, -1] >= 0).all()


class FirstLayer:
    """The first layer's attention output under the mask oracle: its input does not depend on any window."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def windowed(self, ids: Tensor, kept: Retention) -> Tensor:
        kv_heads = SHAPES[self.model.config.model_type][1]
        attention = next(m for m in self.model.modules() if getattr(m, "layer_idx", None) == 0)
        caught: list[Tensor] = []
        projection = next(child for label, child in attention.named_modules() if label in ("o_proj", "dense", "c_proj"))
        hook = projection.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0].detach()))
        try:
            with torch.no_grad(), judged(self.model, [[kept] * kv_heads, [FULL] * kv_heads]):
                self.model(ids[None], use_cache=False)
        finally:
            hook.remove()
        heads = self.model.config.num_attention_heads
        return caught[0].unflatten(-1, (heads, -1))


def test_windows_longer_than_the_text_cost_nothing() -> None:
    model = tiny_model("llama")
    found, _ = text_prices(model, tokens(), WINDOWS, SINKS, (2, 2), seed=0)
    assert found[-1].abs().max() < 1e-9
    assert found[0].max() > 1e-6


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_joint_price_is_the_slope_of_the_divergence_halfway(name: str) -> None:
    model, ids, shape = tiny_model(name).double(), tokens(), SHAPES[name]
    with torch.no_grad():
        probabilities = model(ids[None], use_cache=False).logits[0].float().softmax(-1)
    found = joint_prices(model, ids, probabilities, 8, SINKS, shape)

    def divergence(shift: float) -> float:
        halfway = HalfwayHook(8, SINKS, *shape)
        halfway.gates = torch.full(shape, 0.5)
        halfway.gates[1, 0] += shift
        with torch.no_grad():
            full = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            with attention_hook(model, halfway):
                moved = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        return float(torch.nn.functional.kl_div(moved, full, reduction="sum", log_target=True))

    slope = (divergence(0.01) - divergence(-0.01)) / 0.02
    assert float(found[1, 0]) == pytest.approx(slope, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_fact_prices_add_up_to_the_change_of_the_answers_loss(name: str) -> None:
    model, shape = tiny_model(name), SHAPES[name]
    context, question, answer = tokens(50).tolist(), [7, 9, 11], [20, 30]
    found = fact_prices(model, context, [(question, answer)] * 2, 8, SINKS, shape, nodes=12)
    assert torch.allclose(found[0], found[1], atol=1e-5)  # one question leaves nothing behind for the next
    kept, prompt = [[Retention(SINKS, 8)] * shape[1]] * shape[0], len(context)
    ids = torch.tensor([context + question + answer])

    def loss() -> float:
        logits = model(ids, use_cache=False).logits[0, -len(answer) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))

    with torch.no_grad():
        full = loss()
        with judged(model, kept, "exact", prompt):  # the context attends in full, the question does not
            windowed = loss()
    assert float(found[0].sum()) == pytest.approx(windowed - full, rel=0.02, abs=2e-3)


def test_the_hook_restores_everything_and_refuses_what_it_cannot_price() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), attention_hook(model, Remember()):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError
    assert model.config._attn_implementation == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UnsupportedModelError, match="softcap"):
        text_prices(tiny_model("gemma2", "eager"), tokens(), WINDOWS, SINKS, (2, 2), 0)
