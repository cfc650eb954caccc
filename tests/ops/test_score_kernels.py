"""Kernels of scores against torch's own operations in float32.

On a CUDA device the compiled kernels are tested; elsewhere the same tests run once more in triton's interpreter, where
triton is installed.
"""

from dataclasses import replace

import pytest
import torch

from kvcompress.models.rotary import Rotation
from kvcompress.ops import score_launchers
from kvcompress.scores.attention_received import query_sample, received, received_by_kernel
from kvcompress.scores.compactor import Leverage, chunk_attention, gaussian
from kvcompress.scores.expected_attention import gaussian_logits
from kvcompress.scores.inputs import ScoreInputs
from kvcompress.scores.registry import make_score
from tests.ops.triton_tools import CUDA, DEVICE, needs_cuda, needs_triton, only_where_interpreted, run_interpreted

HALF = [torch.bfloat16, torch.float16]


@only_where_interpreted
def test_these_tests_pass_in_tritons_interpreter():
    run_interpreted(__file__)


def text(count: int, size: int, group: int, dtype: torch.dtype, heads: int = 2) -> ScoreInputs:
    """Keys and queries of a text, laid out token by token; a third of the keys and all of the first thirty stay."""
    torch.manual_seed(0)
    at = torch.arange(count)
    keys, queries = (torch.randn(2, count, n, size).to(DEVICE, dtype).transpose(1, 2) for n in (heads, heads * group))
    inputs = ScoreInputs(
        keys=keys,
        values=torch.randn(2, heads, count, size).to(DEVICE, dtype),
        positions=at[None, None].to(DEVICE),
        scaling=size**-0.5,
        queries=queries,
        query_positions=at[None].to(DEVICE),
        in_order=True,
        query_range=range(count),
    )
    return replace(inputs, stays=((torch.rand(2, heads, count) < 0.3) | (at < 30)).to(DEVICE))


def wide(inputs: ScoreInputs) -> ScoreInputs:
    """The same inputs in float32, which no kernel accepts."""
    return replace(inputs, **{name: getattr(inputs, name).float() for name in ("keys", "values", "queries")})


@needs_triton
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("count", "size", "group", "chunk"),
    [(70, 16, 1, 16), (130, 64, 3, 30), (90, 24, 2, 7), (300, 80, 1, 256), (40, 128, 4, 256)],
)
def test_attention_among_neighbours(count, size, group, chunk, dtype):
    inputs = text(count, size, group, dtype)
    found = score_launchers.among_neighbours(inputs.queries, inputs.keys, inputs.candidates, chunk, 0.7)
    torch.testing.assert_close(found, chunk_attention(wide(inputs), chunk, 0.7), atol=2e-5, rtol=2e-5)


@needs_triton
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("count", "size", "group", "last", "most"),
    [
        (70, 16, 1, None, None),
        (300, 64, 3, None, None),
        (150, 24, 2, 9, None),
        (129, 80, 1, 64, 1000),
        (200, 128, 4, 130, None),
        (20, 16, 2, 64, 20),
        (300, 64, 2, None, 299),
        (260, 16, 1, None, 86),
        (300, 32, 3, 200, 66),
        (90, 16, 1, None, 1),
    ],
)
def test_attention_that_keys_receive(count, size, group, last, most, dtype):
    inputs = text(count, size, group, dtype)
    found = received_by_kernel(inputs, query_sample(count, last, most))
    expected = received(wide(inputs), last, most)
    torch.testing.assert_close(found.total, expected.total, atol=2e-5, rtol=2e-5)
    assert torch.equal(found.queries, expected.queries)


@needs_triton
@pytest.mark.parametrize(("count", "size", "group"), [(70, 16, 1), (130, 64, 3), (20, 80, 2), (65, 128, 4)])
def test_logits_of_gaussian_queries(count, size, group):
    inputs = text(count, size, group, torch.bfloat16)
    mean = torch.randn(2, 2, group, size, device=DEVICE)
    covariance = torch.randn(2, 2, group, size, size, device=DEVICE) / size
    found = score_launchers.gaussian_logits(inputs.keys, mean, covariance, 1.3)
    expected = gaussian_logits(inputs.keys.float(), mean, covariance.bfloat16().float(), 1.3)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@needs_triton
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("count", "size", "turning", "sketch"), [(70, 64, 64, 48), (130, 24, 8, 6), (20, 80, 20, 20), (65, 128, 128, 48)]
)
def test_keys_before_rotation(count, size, turning, sketch, dtype):
    inputs = replace(text(count, size, 1, dtype), rotation=Rotation(turning, 100.0))
    projection = gaussian(size, sketch, 3, DEVICE)
    found = score_launchers.turned_back(inputs.keys, inputs.candidates, inputs.rotation, projection)
    expected = Leverage(sketch=sketch, seed=3).projected(wide(inputs))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@needs_triton
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("count", "size", "turning"), [(70, 64, 64), (130, 24, 8), (20, 80, 20), (65, 128, 128)])
def test_vectors_turned(count, size, turning, dtype):
    rotation, vectors = Rotation(turning, 100.0), text(count, size, 3, dtype).queries[:, :, ::2]
    at = torch.arange(vectors.shape[2], device=DEVICE)
    found = score_launchers.turned(vectors, *rotation.cos_sin(-at))
    torch.testing.assert_close(found, rotation.turn(vectors.float(), -at), atol=1e-5, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize(("count", "size"), [(70, 48), (20, 6), (65, 128)])
def test_squared_lengths(count, size):
    torch.manual_seed(0)
    vectors, middle, matrix = (
        torch.randn(2, 3, *shape, device=DEVICE) for shape in ((count, size), (size,), (size, size))
    )
    expected = ((vectors - middle[:, :, None]) @ matrix).square().sum(-1)
    torch.testing.assert_close(score_launchers.squared_lengths(vectors, middle, matrix), expected, atol=1e-3, rtol=1e-4)


LAUNCHED = {
    "leverage": {"among_neighbours", "turned_back", "squared_lengths"},
    "snapkv": {"received_by_keys"},
    "accumulated_attention": {"received_by_keys"},
    "expected_attention": {"gaussian_logits", "turned"},
}


@needs_cuda
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", LAUNCHED)
def test_scores_are_the_same_with_and_without_kernels(name, dtype, monkeypatch):
    inputs, score, launched = text(600, 64, 3, dtype), make_score(name), set()
    inputs = replace(inputs, rotation=Rotation(64, 100.0))
    for launch in set.union(*LAUNCHED.values()):
        real = getattr(score_launchers, launch)
        noted = lambda *args, real=real, launch=launch: (launched.add(launch), real(*args))[1]  # noqa: E731
        monkeypatch.setattr(score_launchers, launch, noted)
    found = score(inputs)
    # Powers of Gaussian queries leave the range of float16: that goes without a kernel.
    assert launched == LAUNCHED[name] - ({"gaussian_logits"} if dtype == torch.float16 else set())
    monkeypatch.setattr(score_launchers, "can_launch", lambda *tensors: False)
    expected, free = score(inputs), inputs.candidates
    # Without the kernel, products of bfloat16 are rounded to it on their way.
    error = (found[free] - expected[free]).abs() / expected[free].abs().mean()
    assert error.max() < (5e-2 if name == "expected_attention" else 1e-3)
    torch.testing.assert_close(found[~free], expected[~free])


def test_float32_and_cpus_go_without():
    inputs = text(50, 16, 1, torch.float32)
    assert not score_launchers.can_launch(inputs.queries, inputs.keys)
    if not CUDA:
        assert not score_launchers.can_launch(inputs.queries.bfloat16(), inputs.keys.bfloat16())
