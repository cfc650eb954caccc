"""Tables that drive the tests of scores: scores with their parameters, and inputs.

Inputs are random: a prompt, a stream with gaps, rows with padding, keys that stay, a text in order.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from kvcompress.models.rotary import Rotation
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs
from kvcompress.scores.registry import SCORES

BATCH, HEADS, GROUP, SIZE, PROMPT = 2, 2, 3, 12, 40
ROTATION = Rotation(8, 100.0)  # partial: four of a head's twelve dimensions do not turn


def prompt() -> ScoreInputs:
    """The end of an exact prefill: all keys, all queries."""
    torch.manual_seed(0)
    return ScoreInputs(
        keys=torch.randn(BATCH, HEADS, PROMPT, SIZE),
        values=torch.randn(BATCH, HEADS, PROMPT, 5),
        positions=torch.arange(PROMPT)[None, None],
        scaling=0.3,
        queries=torch.randn(BATCH, HEADS * GROUP, PROMPT, SIZE),
        query_positions=torch.arange(PROMPT)[None],
        rotation=ROTATION,
    )


def stream() -> ScoreInputs:
    """A chunk of 14 queries over keys at positions of each head and row, in any order, and the chunk."""
    torch.manual_seed(1)
    rows = [[torch.randperm(90)[:26].tolist() for _ in range(HEADS)] for _ in range(BATCH)]
    positions = torch.tensor([[row + list(range(90, 104)) for row in heads] for heads in rows])
    positions = positions.gather(-1, torch.rand(positions.shape).argsort(-1))
    earlier = AttentionTotals(torch.rand(positions.shape) * 5, torch.randint(5, 90, positions.shape).float())
    return replace(
        prompt(),
        positions=positions,
        queries=torch.randn(BATCH, HEADS * GROUP, 14, SIZE),
        query_positions=torch.arange(90, 104)[None],
        earlier=earlier,
    )


def padded() -> ScoreInputs:
    """A prompt whose rows begin with 3 and with 17 pads, whose slots hold NaN."""
    inputs, columns = prompt(), torch.arange(PROMPT)
    at = torch.stack([columns - 3, columns - 17])
    positions = at.clamp_min(-1)[:, None]
    empty = (positions < 0)[..., None]
    return replace(
        inputs,
        keys=inputs.keys.masked_fill(empty, float("nan")),
        values=inputs.values.masked_fill(empty, float("nan")),
        queries=inputs.queries.masked_fill(empty, 7.0),
        positions=positions,
        query_positions=at,
    )


def with_stays(inputs: ScoreInputs) -> ScoreInputs:
    positions = inputs.positions
    return replace(inputs, stays=(positions < 4) | (positions > positions.amax(-1, keepdim=True) - 6))


CASES: dict[str, Callable[[], ScoreInputs]] = {
    "prompt": prompt,
    "stream": stream,
    "padded": padded,
    "prompt, sinks and window stay": lambda: with_stays(prompt()),
    "stream, sinks and window stay": lambda: with_stays(stream()),
    "whole text": lambda: with_stays(replace(prompt(), in_order=True)),
}

# Every score with default parameters, and each parameter with another value.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in SCORES),
    ("snapkv", {"window": 5, "kernel": 7, "pooling": "max"}),
    ("snapkv", {"window": 9, "kernel": 1}),
    ("expected_attention", {"future": 20, "skip": 0, "epsilon": 0.02}),
    ("expected_attention", {"covariance": False, "value_norm": False, "skip": 1000}),
    ("expected_attention", {"most": 9}),
    ("leverage", {"sketch": 6, "chunk": 16, "seed": 3, "scale": None}),
    ("leverage", {"unrotate": False, "chunk": 7, "kernel": 5, "ridge": 1.0, "blend": 2.0}),
    ("accumulated_attention", {"per_query": False, "most": None}),
    ("accumulated_attention", {"most": 9}),
]
