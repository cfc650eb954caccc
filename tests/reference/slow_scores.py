"""Definition of every score, one key and one query at a time, in float64: slow and plain, to compare with.

`Slow(inputs)` unpacks a `ScoreInputs`. Its methods have the names of the scores and take the score for its
parameters. Empty slots get -inf and keys that stay +inf, as in the interface.
"""

import math
from functools import cache

import torch
from torch import Tensor

from kvcompress.scores.base import Score
from kvcompress.scores.inputs import ScoreInputs


def rotated(vector: Tensor, by: int, dim: int, theta: float) -> Tensor:
    """Turn a vector by `by` positions: dimensions i and i + dim / 2 are a plane that turns by theta ** (-2 i / dim)."""
    out = vector.clone()
    for i in range(dim // 2):
        angle = by * theta ** (-2 * i / dim)
        x, y = float(vector[i]), float(vector[i + dim // 2])
        out[i] = x * math.cos(angle) - y * math.sin(angle)
        out[i + dim // 2] = y * math.cos(angle) + x * math.sin(angle)
    return out


class Slow:
    def __init__(self, inputs: ScoreInputs) -> None:
        self.inputs = inputs
        self.batch, self.heads, self.count = inputs.keys.shape[:3]
        shape = (self.batch, self.heads, self.count)
        self.at = inputs.positions.expand(shape).tolist()
        self.stays = (inputs.stays if inputs.stays is not None else torch.zeros(1, 1, 1, dtype=torch.bool)).expand(
            shape
        )
        self.keys, self.values = inputs.keys.double(), inputs.values.double()
        assert inputs.queries is not None
        assert inputs.query_positions is not None
        self.queries = inputs.queries.double()
        self.group, self.asked = self.queries.shape[1] // self.heads, self.queries.shape[2]
        self.asked_at = inputs.query_positions.expand(self.batch, -1).tolist()

    def answer(self, name: str, score: Score) -> Tensor:
        out = torch.full((self.batch, self.heads, self.count), -math.inf, dtype=torch.float64)
        for b in range(self.batch):
            for h in range(self.heads):
                found = getattr(self, name)(score, b, h)
                for k in self.real(b, h):
                    out[b, h, k] = math.inf if self.stays[b, h, k] else found[k]
        return out

    def real(self, b: int, h: int) -> list[int]:
        return [k for k in range(self.count) if self.at[b][h][k] >= 0]

    def candidates(self, b: int, h: int) -> list[int]:
        return [k for k in self.real(b, h) if not self.stays[b, h, k]]

    def at_most(self, most: int | None) -> range:
        """Queries at equal distances, the last one first."""
        return range(self.asked - 1, -1, -math.ceil(self.asked / (most or self.asked)))

    def heads_of(self, h: int) -> range:
        return range(h * self.group, (h + 1) * self.group)

    def softmax(self, logits: dict[int, float]) -> dict[int, float]:
        top = max(logits.values(), default=0.0)
        total = sum(math.exp(logit - top) for logit in logits.values())
        return {k: math.exp(logit - top) / total for k, logit in logits.items()}

    def attention(self, b: int, h: int, some: range) -> tuple[dict[int, float], dict[int, int]]:
        """Attention that keys receive from some queries, mean over query heads, and how many queries see each."""
        total, number = {k: 0.0 for k in self.real(b, h)}, {k: 0 for k in self.real(b, h)}
        for q in some:
            seen = [k for k in self.real(b, h) if self.at[b][h][k] <= self.asked_at[b][q]]
            for k in seen:
                number[k] += 1
            for head in self.heads_of(h):
                logits = {k: float(self.queries[b, head, q] @ self.keys[b, h, k]) * self.inputs.scaling for k in seen}
                for k, weight in self.softmax(logits).items():
                    total[k] += weight / self.group
        return total, number

    def pooled(self, scores: dict[int, float], b: int, h: int, radius: int, how: str) -> dict[int, float]:
        at, out = self.at[b][h], {}
        for k in scores:
            near = [scores[n] for n in scores if abs(at[n] - at[k]) <= radius]
            out[k] = max(near) if how == "max" else sum(near) / len(near)
        return out

    def key_norm(self, score, b, h):
        return {k: -float(self.keys[b, h, k].norm()) for k in self.real(b, h)}

    def key_diff(self, score, b, h):
        keys = self.keys[b, h]
        anchor = sum(keys[k] / keys[k].norm() for k in self.real(b, h)) / len(self.real(b, h))
        return {k: -float(keys[k] @ anchor / (keys[k].norm() * anchor.norm())) for k in self.real(b, h)}

    def snapkv(self, score, b, h):
        total, number = self.attention(b, h, range(self.asked)[-score.window :])
        mean = {k: total[k] / max(number[k], 1) for k in total}
        return self.pooled(mean, b, h, score.kernel // 2, score.pooling)

    def accumulated_attention(self, score, b, h):
        total, number = self.attention(b, h, self.at_most(score.most))
        if self.inputs.earlier is not None:
            for k in total:
                total[k] += float(self.inputs.earlier.total[b, h, k])
                number[k] += int(self.inputs.earlier.queries[b, h, k])
        return {k: total[k] / max(number[k], 1) if score.per_query else total[k] for k in total}

    def expected_attention(self, score, b, h):
        rotation, scale, keys = self.inputs.rotation, self.inputs.scaling, self.keys[b, h]
        candidates, out = self.candidates(b, h), dict.fromkeys(self.real(b, h), 0.0)
        for head in self.heads_of(h):
            some = self.at_most(score.most)
            of = [q for q in some if self.asked_at[b][q] >= score.skip]
            of = of or [q for q in some if self.asked_at[b][q] >= 0]
            plain = [rotated(self.queries[b, head, q], -self.asked_at[b][q], rotation.dim, rotation.theta) for q in of]
            mean = sum(plain) / len(plain)
            spread = sum(torch.outer(v - mean, v - mean) for v in plain) / len(plain)
            turn = self.mean_rotation(max(self.asked_at[b]) + 1, score.future)
            mean, spread = turn @ mean, turn @ spread @ turn.T
            logits = {}
            for k in candidates:
                logits[k] = float(keys[k] @ mean) * scale
                if score.covariance:
                    logits[k] += float(keys[k] @ spread @ keys[k]) * scale**2 / 2
            for k, weight in self.softmax(logits).items():
                out[k] += weight / self.group
        if score.value_norm:
            return {k: (out[k] + score.epsilon) * float(self.values[b, h, k].norm()) for k in out}
        return {k: out[k] + score.epsilon for k in out}

    @cache  # noqa: B019
    def mean_rotation(self, first: int, count: int) -> Tensor:
        """The mean of the matrices of rotations by `first` and the `count` - 1 positions after it."""
        rotation, unit = self.inputs.rotation, torch.eye(self.keys.shape[-1], dtype=torch.float64)
        total = torch.zeros_like(unit)
        for by in range(first, first + count):
            total += torch.stack([rotated(row, by, rotation.dim, rotation.theta) for row in unit], dim=1)
        return total / count

    def leverage(self, score, b, h):
        candidates = self.candidates(b, h)
        if not candidates:
            return {}
        rows = [self.keys[b, h, k] for k in candidates]
        if score.unrotate:
            rotation = self.inputs.rotation
            at = [self.at[b][h][k] for k in candidates]
            rows = [rotated(row, -p, rotation.dim, rotation.theta) for row, p in zip(rows, at, strict=True)]
        matrix = torch.stack(rows)
        matrix = matrix - matrix.mean(0)
        if score.sketch < matrix.shape[1]:
            generator = torch.Generator().manual_seed(score.seed)
            matrix = (
                matrix @ (torch.randn(matrix.shape[1], score.sketch, generator=generator) / score.sketch**0.5).double()
            )
        gram = matrix.T @ matrix + score.ridge * torch.eye(matrix.shape[1], dtype=torch.float64)
        levers = (matrix @ torch.linalg.inv(gram) @ matrix.T).diagonal()
        levers = {k: float(lever) for k, lever in zip(candidates, levers, strict=True)}
        attention = self.chunk_attention(score, b, h)
        attention = {k: attention[k] * float(self.values[b, h, k].norm()) for k in candidates}
        attention = self.pooled(attention, b, h, score.kernel // 2, "mean")
        levers, attention = self.standard(levers), self.standard(attention)
        return {k: score.blend * levers[k] + attention[k] for k in candidates}

    def chunk_attention(self, score, b, h):
        scale = self.inputs.scaling if score.scale is None else score.scale
        asked = [q for q in range(self.asked) if self.asked_at[b][q] >= 0]
        first = min(self.asked_at[b][q] for q in asked)
        chunk_of = {k: (self.at[b][h][k] - first) // score.chunk for k in self.candidates(b, h)}
        chunk_of = {k: max(chunk, -1) for k, chunk in chunk_of.items()}
        out = dict.fromkeys(chunk_of, 0.0)
        for chunk in set(chunk_of.values()):
            near = [k for k in chunk_of if chunk_of[k] == chunk]
            voters = [q for q in asked if chunk < 0 or (self.asked_at[b][q] - first) // score.chunk == chunk]
            for q in voters:
                for head in self.heads_of(h):
                    logits = {k: float(self.queries[b, head, q] @ self.keys[b, h, k]) * scale for k in near}
                    for k, weight in self.softmax(logits).items():
                        out[k] += weight / self.group * len(near) / len(voters)
        return out

    def standard(self, scores):
        mean = sum(scores.values()) / len(scores)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in scores.values()) / len(scores))
        return {k: (x - mean) / max(deviation, 1e-6) for k, x in scores.items()}
