"""What a head's output loses when some of its slots hold keys that a score chose, and the others a window.

As with windows alone (`window_changes`) the output over fewer keys is the same softmax rescaled; to the sums over sinks
and window those over the chosen keys are added. Keys are chosen as the cache does (`kvcompress.scores.selection_rule`), with three
differences. It can take back nothing that it once gave up, here every choice is between all older keys. It ranks by the
last few queries once the prompt is read, here all queries so far count. And one ranking serves all sizes, so that scores
which compare keys with each other see those in the window too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcompress.core.errors import UnsupportedModelError
from kvcompress.models.architecture import Architecture
from kvcompress.models.rotary import Rotation
from kvcompress.scores.inputs import ScoreInputs
from kvcompress.scores.registry import make_score
from kvcompress.scores.topk import best
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.window_outputs import Sums

STEP = 64  # tokens between two choices; windows are no shorter


class Choice(NamedTuple):
    """Of `size` slots besides sinks the part `part` holds keys that the score of this name chose."""

    score: str
    part: float
    size: int

    @property
    def chosen(self) -> int:
        return chosen_of(self.size, self.part)

    @property
    def window(self) -> int:
        return self.size - self.chosen


def chosen_of(size: int, part: float) -> int:
    """How many of `size` slots are chosen: the part, rounded, but one at least stays for the window."""
    return min(round(part * size), size - 1)


def priced_choices(config: Any, settings: SensitivityParams, length: int) -> tuple[list[Choice], Rotation | None]:
    """The choices of `settings` that fit documents of `length` tokens, and the model's rotation, None where not known.

    Without it scores that need it are left out, and all where the model has a sliding window of its own: no cache can
    choose there.
    """
    try:
        rotation = Rotation.of(config)
    except UnsupportedModelError:
        rotation = None
    if any(limit is not None for limit in Architecture.of_config(config).sliding_windows):
        return [], rotation
    scores = [name for name in settings.choice_scores if rotation or not make_score(name).needs_rotation]
    found = [
        Choice(score, part, size)
        for score in scores
        for part in settings.choice_parts
        for size in settings.choice_sizes
    ]
    return [one for one in found if one.window >= STEP and one.size + settings.sinks < length], rotation


@dataclass(frozen=True)
class Chosen:
    """Keys chosen at one or more moments: `slots` int64 `[kv_head, moment, k]`, `there` false where one stands for none."""

    slots: Tensor
    there: Tensor


def chosen_at(
    moments: Sequence[int],
    choices: Sequence[Choice],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: int,
    scaling: float,
    rotation: Rotation | None,
) -> list[Chosen]:
    """What every choice takes when so many tokens of a text have been read.

    query: `[query_head, token, head_dim]`; key, value: `[kv_head, token, dim]`. Candidates are the keys that leave the
    window within the next STEP tokens or have left it; scores know the queries up to there.
    """
    slots = [torch.zeros(len(key), len(moments), choice.chosen, dtype=torch.int64) for choice in choices]
    found = [Chosen(each.to(key.device), each.bool().to(key.device)) for each in slots]
    for moment, seen in enumerate(moments):
        if not seen:
            continue
        at = torch.arange(seen, device=key.device)
        held = ScoreInputs(
            key[None, :, :seen],
            value[None, :, :seen],
            at[None, None],
            scaling,
            query[None, :, :seen],
            at[None],
            rotation,
            stays=(at < sinks)[None, None],
            in_order=True,
        )
        ranked = {name: make_score(name)(held) for name in dict.fromkeys(choice.score for choice in choices)}
        for choice, chosen in zip(choices, found, strict=True):
            older = (at >= sinks) & (at < seen - choice.window + STEP)
            scores, count = ranked[choice.score].masked_fill(~older, -float("inf")), min(choice.chosen, seen)
            taken = best(scores, count)
            chosen.slots[:, moment, :count] = taken[0]
            chosen.there[:, moment, :count] = (scores.gather(-1, taken) > -float("inf"))[0]
    return found


def chosen_sums(weights: Tensor, value: Tensor, chosen: Chosen, window: int, step: int) -> Sums:
    """The sums over chosen keys that have left the window.

    weights: `[kv_head, group, query, key]`, the last queries of the text; value: `[kv_head, key, value_dim]`. The choice of
    moment i serves the i-th `step` queries.
    """
    group, length, keys = weights.shape[1:]
    moments = chosen.slots.shape[1]
    rows = torch.nn.functional.pad(weights, (0, 0, 0, moments * step - length)).unflatten(2, (moments, step))
    parts = rows.gather(-1, chosen.slots[:, None, :, None].expand(-1, group, -1, step, -1))
    position = (keys - length + torch.arange(moments * step, device=weights.device)).view(moments, step, 1)
    left = (chosen.slots[:, :, None] <= position - window) & chosen.there[:, :, None]  # [kv_head, moment, step, k]
    parts = parts * left[:, None]
    values = value.gather(1, chosen.slots.flatten(1)[..., None].expand(-1, -1, value.shape[2]))
    values = values.unflatten(1, (moments, -1))[:, None]  # [kv_head, 1, moment, k, value_dim]
    return (parts @ values).flatten(2, 3)[:, :, :length], parts.sum(-1).flatten(2, 3)[:, :, :length]
