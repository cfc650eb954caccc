"""Properties of scores whatever their formula: order, grouping and padding do not matter; needles are found."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcompress.core.errors import InputError, UnsupportedModelError
from kvcompress.models.rotary import Rotation
from kvcompress.scores.attention_received import received
from kvcompress.scores.compactor import Leverage
from kvcompress.scores.expected_attention import ExpectedAttention
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs
from kvcompress.scores.registry import SCORES, make_score
from kvcompress.sensitivity.attention_hook import LayerAttention, attention_hook
from tests.scores.cases import GROUP, PROMPT, ROTATION, padded, prompt, stream, with_stays
from tests.tiny import tiny_model

ROTATION_OF_4 = Rotation(4, 10.0)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def with_new_keys(before: AttentionTotals, keys: int) -> AttentionTotals:
    return AttentionTotals(*(torch.nn.functional.pad(tensor, (0, keys)) for tensor in (before.total, before.queries)))


@pytest.mark.parametrize("name", SCORES)
def test_the_order_of_slots_does_not_matter(name: str) -> None:
    inputs, score = with_stays(stream()), make_score(name)
    order = torch.randperm(PROMPT)
    fields = {field: getattr(inputs, field)[:, :, order] for field in ("keys", "values", "positions", "stays")}
    slots = order.expand(inputs.keys.shape[:3])
    assert inputs.earlier is not None
    assert close(score(replace(inputs, earlier=inputs.earlier.take(slots), **fields)), score(inputs)[..., order])


@pytest.mark.parametrize("name", SCORES)
def test_a_head_and_a_row_score_the_same_alone(name: str) -> None:
    inputs, score = padded(), make_score(name)
    assert inputs.queries is not None
    assert inputs.query_positions is not None
    whole = score(inputs)
    head = replace(inputs, keys=inputs.keys[:, 1:], values=inputs.values[:, 1:], queries=inputs.queries[:, GROUP:])
    assert close(score(head), whole[:, 1:])
    row = {field: getattr(inputs, field)[1:, :, 17:] for field in ("keys", "values", "positions", "queries")}
    alone = replace(inputs, query_positions=inputs.query_positions[1:, 17:], **row)
    assert close(score(alone), whole[1:, :, 17:])
    assert (whole[1, :, :17] == -torch.inf).all()


@pytest.mark.parametrize("name", SCORES)
def test_prefixes_score_as_texts_that_end_there(name: str) -> None:
    model = tiny_model("llama")
    remember = Remember()
    ids = torch.randint(1, 256, (1, 500), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), attention_hook(model, remember):
        model(ids, use_cache=False)
    assert remember.first is not None
    queries, keys, values, scale = remember.first
    at, score = torch.arange(500), make_score(name)
    stays = (at < 4)[None, None]
    text = ScoreInputs(
        keys, values, at[None, None], scale, queries, at[None], Rotation.of(model.config), stays, in_order=True
    )
    lengths = [64, 256, 300, 500]
    for length, found in zip(lengths, score.of_prefixes(text, lengths), strict=True):
        assert close(found[..., 4:], score(text.between(0, length))[..., 4:]), length


@pytest.mark.parametrize("name", SCORES)
def test_what_a_score_needs_is_asked_for(name: str) -> None:
    score = make_score(name)
    if score.needs_queries:
        for none in (None, torch.zeros(2, 6, 0, 12)):
            with pytest.raises(InputError, match="there are none"):
                score(replace(prompt(), queries=none, query_positions=torch.zeros(1, 0, dtype=torch.long)))
    else:
        assert score(replace(prompt(), queries=None)).isfinite().all()
    if score.needs_rotation:
        with pytest.raises(UnsupportedModelError, match="rotary embedding is not known"):
            score(replace(prompt(), rotation=None))
    else:
        assert close(score(replace(prompt(), rotation=None)), score(prompt()))


@pytest.mark.parametrize("name", SCORES)
def test_scores_repeat_and_are_float32(name: str) -> None:
    inputs, score = prompt(), make_score(name)
    torch.manual_seed(5)
    first = score(inputs)
    assert torch.equal(first, score(inputs))
    assert inputs.queries is not None
    half = replace(inputs, **{n: getattr(inputs, n).bfloat16() for n in ("keys", "values", "queries")})
    assert score(half).dtype == torch.float32


@pytest.mark.parametrize("name", ["key_diff", "leverage"])
def test_a_needle_is_found(name: str) -> None:
    torch.manual_seed(2)
    inputs = prompt()
    keys = 0.1 * torch.randn(inputs.keys.shape) + torch.randn(1, 2, 1, 12)
    needle = torch.randn(2, 2, 12) * torch.tensor(3.0)
    positions = torch.arange(PROMPT)
    keys[:, :, 23] = needle
    inputs = replace(inputs, keys=ROTATION.turn(keys, positions) if name == "leverage" else keys)
    assert (make_score(name)(inputs).argmax(-1) == 23).all()


def test_leverage_is_exact_without_a_sketch_and_near_it_with_one() -> None:
    torch.manual_seed(3)
    keys = torch.randn(1, 1, 400, 64) * torch.linspace(0.1, 3, 400)[:, None]
    plain = ScoreInputs(keys, keys, torch.arange(400)[None, None], 0.125)
    exact = Leverage(sketch=64, ridge=1e-9, unrotate=False).leverage(plain)[0, 0]
    centred = (keys - keys.mean(2, keepdim=True))[0, 0].double()
    basis = torch.linalg.qr(centred).Q
    assert torch.allclose(exact.double(), basis.square().sum(-1), atol=1e-5)
    assert float(exact.sum()) == pytest.approx(64, rel=1e-4)
    near = Leverage(sketch=48, unrotate=False).leverage(plain)[0, 0]
    assert float(torch.corrcoef(torch.stack([exact, near]))[0, 1]) > 0.9


def test_attention_adds_up_over_chunks() -> None:
    """A stream that forgets nothing ends with the sums of the whole prompt, and forgetting takes the sums along."""
    inputs = prompt()
    assert inputs.queries is not None
    before = None
    for begin, end in ((0, 9), (9, 10), (10, 31), (31, PROMPT)):
        chunk = replace(
            inputs,
            keys=inputs.keys[:, :, :end],
            values=inputs.values[:, :, :end],
            positions=inputs.positions[..., :end],
            queries=inputs.queries[:, :, begin:end],
            query_positions=torch.arange(begin, end)[None],
            earlier=None if before is None else with_new_keys(before, end - begin),
        )
        before = received(chunk)
    assert before is not None
    whole = received(inputs)
    assert close(before.total, whole.total)
    assert torch.equal(before.queries, whole.queries)
    assert torch.equal(whole.queries[0, 0], torch.arange(PROMPT, 0, -1.0))
    slots = torch.tensor([1, 5, 7]).expand(2, 2, 3)
    assert torch.equal(before.take(slots).total, before.total[..., [1, 5, 7]])


def test_expected_attention_of_equal_queries_is_that_of_the_mean() -> None:
    """Without spread, and one position ahead, it is the attention that the query itself will give."""
    inputs = replace(prompt(), queries=None)
    plain = torch.randn(2, 6, 1, 12)
    at = torch.arange(PROMPT)
    inputs = replace(inputs, queries=ROTATION.turn(plain.expand(-1, -1, PROMPT, -1), at), query_positions=at[None])
    coming = ROTATION.turn(plain, torch.tensor([PROMPT])).unflatten(1, (2, GROUP))[..., 0, :]
    logits = torch.einsum("bhnd,bhgd->bhgn", inputs.keys, coming) * inputs.scaling
    expected = logits.softmax(-1).mean(2) * inputs.values.norm(dim=-1)
    assert close(ExpectedAttention(future=1)(inputs), expected)


def test_expected_attention_is_the_mean_over_gaussian_queries() -> None:
    torch.manual_seed(4)
    root, mean = torch.randn(4, 4) * 0.7, torch.randn(4)
    draws = mean + torch.randn(100_000, 4) @ root
    keys = torch.randn(1, 1, 6, 4)
    turned = ROTATION_OF_4.turn(draws[None, None], torch.arange(4, 100_004) % 50)
    at = torch.arange(4, 100_004)[None] % 50
    inputs = ScoreInputs(keys, keys, torch.arange(6)[None, None], 0.25, turned, at, ROTATION_OF_4)
    found = ExpectedAttention(future=1, skip=0, value_norm=False, most=100_000)(inputs)[0, 0]
    coming = ROTATION_OF_4.turn(draws, torch.tensor([50]))
    mean_of_exponentials = (coming @ keys[0, 0].T * 0.25).exp().mean(0)
    assert torch.allclose(found, mean_of_exponentials / mean_of_exponentials.sum(), rtol=0.01)


class Remember:
    """Keeps the first layer's queries, keys and values."""

    def __init__(self) -> None:
        self.first: tuple[Tensor, Tensor, Tensor, float] | None = None

    def __call__(self, attention: LayerAttention) -> Tensor:
        self.first = self.first or (attention.query, attention.key, attention.value, attention.scaling)
        return attention.output


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi"])
def test_a_models_own_queries_can_be_turned_back(name: str) -> None:
    """What its projection gave comes out before rotation, whatever part of a head rotates; then every score works."""
    model, remember, length = tiny_model(name), Remember(), 30
    caught: list[Tensor] = []
    projection = next(m for label, m in model.named_modules() if label.endswith(("q_proj", "query_key_value")))
    projection.register_forward_hook(lambda module, inputs, output: caught.append(output.detach()))
    ids = torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), attention_hook(model, remember):
        model(ids, use_cache=False)
    assert remember.first is not None
    queries, keys, values, scale = remember.first
    plain = caught[0].unflatten(-1, (queries.shape[1], -1))[..., : queries.shape[-1]].transpose(1, 2)
    rotation, at = Rotation.of(model.config), torch.arange(length)
    assert torch.allclose(rotation.turn(queries, -at), plain, atol=1e-4)
    assert not torch.allclose(queries, plain, atol=1e-2)
    inputs = ScoreInputs(keys, values, at[None, None], scale, queries, at[None], rotation)
    for score in SCORES:
        assert make_score(score)(inputs).isfinite().all(), score
