"""Change of a head's attention output when its slots hold a window, or a window and keys that a score selected.

The output over fewer keys is the same softmax rescaled (`window_outputs`): the sums over selected keys are added to those
over sinks and window. Keys are selected by the rule of the cache (`kvcompress.scores.selection_rule`) with three
differences. Every selection is among all older keys, while a cache cannot take back an evicted key. Scores see all
queries so far, while a cache sees the last few once the prompt is read. One ranking serves all sizes, so scores that
compare keys with each other also see the keys of the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.core.errors import UnsupportedModelError
from kvcompress.models.architecture import Architecture
from kvcompress.models.rotary import Rotation
from kvcompress.scores.inputs import ScoreInputs
from kvcompress.scores.registry import make_score
from kvcompress.scores.topk import best
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.prices import SelectOption
from kvcompress.sensitivity.window_outputs import Sums, change, mixed, past_weights, window_sums

STEP = 64  # tokens between two selections; windows are no shorter


def select_options(config: Any, settings: SensitivityParams, length: int) -> tuple[list[SelectOption], Rotation | None]:
    """Options of `settings` that fit documents of `length` tokens, and the model's rotation (None if unknown).

    Without a rotation, scores that need it are left out. A model with a sliding window has no options, because its cache
    cannot select.
    """
    try:
        rotation = Rotation.of(config)
    except UnsupportedModelError:
        rotation = None
    if any(limit is not None for limit in Architecture.of_config(config).sliding_windows):
        return [], rotation
    scores = [name for name in settings.choice_scores if rotation or not make_score(name).needs_rotation]
    found = [
        SelectOption(score, part, size)
        for score in scores
        for part in settings.choice_parts
        for size in settings.choice_sizes
    ]
    return [one for one in found if one.window >= STEP and one.size + settings.sinks < length], rotation


@dataclass(frozen=True)
class SelectedKeys:
    """Keys that one option selected at several moments: `slots` int64 `[kv_head, moment, k]`, `valid` false in unused
    entries."""

    slots: Tensor
    valid: Tensor

    def serving(self, start: int, stop: int) -> "SelectedKeys":
        """Moments that serve the queries `start` (a multiple of STEP) to `stop`."""
        moments = slice(start // STEP, -(-stop // STEP))
        return SelectedKeys(self.slots[:, moments], self.valid[:, moments])


def selected_keys(
    moments: Sequence[int],
    options: Sequence[SelectOption],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: int,
    scaling: float,
    rotation: Rotation | None,
) -> list[SelectedKeys]:
    """Keys that every option selects after each number of tokens in `moments`.

    query: `[query_head, token, head_dim]`; key, value: `[kv_head, token, dim]`. Candidates are the keys that have left the
    window or leave it within the next STEP tokens. Scores know the queries up to the moment.
    """
    slots = [torch.zeros(len(key), len(moments), option.selected, dtype=torch.int64) for option in options]
    found = [SelectedKeys(each.to(key.device), each.bool().to(key.device)) for each in slots]
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
        ranked = {name: make_score(name)(held) for name in dict.fromkeys(option.score for option in options)}
        for option, selected in zip(options, found, strict=True):
            older = (at >= sinks) & (at < seen - option.window + STEP)
            scores, count = ranked[option.score].masked_fill(~older, -float("inf")), min(option.selected, seen)
            taken = best(scores, count)
            selected.slots[:, moment, :count] = taken[0]
            selected.valid[:, moment, :count] = (scores.gather(-1, taken) > -float("inf"))[0]
    return found


def selected_sums(weights: Tensor, value: Tensor, selected: SelectedKeys, window: int, step: int) -> Sums:
    """Sums over the selected keys that have left the window.

    weights: `[kv_head, group, query, key]`, the last queries of the text; value: `[kv_head, key, value_dim]`. Moment i
    serves the i-th `step` queries.
    """
    group, length, keys = weights.shape[1:]
    moments = selected.slots.shape[1]
    rows = torch.nn.functional.pad(weights, (0, 0, 0, moments * step - length)).unflatten(2, (moments, step))
    parts = rows.gather(-1, selected.slots[:, None, :, None].expand(-1, group, -1, step, -1))
    position = (keys - length + torch.arange(moments * step, device=weights.device)).view(moments, step, 1)
    left = (selected.slots[:, :, None] <= position - window) & selected.valid[:, :, None]
    parts = parts * left[:, None]  # [kv_head, group, moment, step, k]
    values = value.gather(1, selected.slots.flatten(1)[..., None].expand(-1, -1, value.shape[2]))
    values = values.unflatten(1, (moments, -1))[:, None]  # [kv_head, 1, moment, k, value_dim]
    return (parts @ values).flatten(2, 3)[:, :, :length], parts.sum(-1).flatten(2, 3)[:, :, :length]


def output_changes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Sequence[int],
    sinks: int,
    scaling: float,
    sliding_window: int | None = None,
    options: Sequence[SelectOption] = (),
    selected: Sequence[SelectedKeys] = (),
    step: int = STEP,
) -> tuple[Tensor, Tensor]:
    """Changes `[window or option, kv_head, group, query, value_dim]` and full output without the first axis, float32.

    query: `[kv_head, group, query, head_dim]`, the last queries of the text; key, value: `[kv_head, key, dim]`, the whole
    text. A change is the output over fewer keys minus the full output. Windows ascend and come before options;
    `selected` are each option's keys, one moment for every `step` queries.
    """
    weights, value = past_weights(query, key, scaling, sliding_window), value.float()
    full = mixed(weights, value)
    every = sorted({*windows, *(option.window for option in options)})
    near = dict(zip(every, window_sums(weights, value, every, sinks), strict=True))
    found = [change(near[window], full) for window in windows]
    for option, keys in zip(options, selected, strict=True):
        kept, mass = near[option.window]
        more, more_mass = selected_sums(weights, value, keys, option.window, step)
        found.append(change((kept + more, mass + more_mass), full))
    return torch.stack(found), full
