"""Change of a head's attention output when its slots hold a window, or a window and keys that a score selected.

With p the attention weights over the whole past, the output over a set S of keys is the sum of p_k v_k over S
divided by the sum of p_k: softmax over fewer keys is the same softmax, rescaled. Only the change along a gradient g is
needed,

    g . change = sum_{k in S} p_k (g . v_k) / sum_{k in S} p_k  -  sum_k p_k (g . v_k)

so every set costs two sums of numbers instead of a sum of vectors. Windows are nested: keys are added ring by ring from
the nearest outwards, and every window costs only its own ring.

Keys are selected by the rule of the cache (`kvcompress.scores.selection_rule`) with three differences. Every selection
is among all older keys, while a cache cannot take back an evicted key. Scores see all queries so far, while a cache
sees the last few once the prompt is read. One ranking serves all sizes, so scores that compare keys with each other
also see the keys of the window.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompress.collect.observer import hide
from kvcompress.core.errors import UnsupportedModelError
from kvcompress.models.architecture import Architecture
from kvcompress.models.rotary import Rotation
from kvcompress.scores.inputs import ScoreInputs
from kvcompress.scores.registry import make_score
from kvcompress.scores.topk import best
from kvcompress.sensitivity.params import SensitivityParams
from kvcompress.sensitivity.prices import SelectOption

STEP = 64  # tokens between two selections; windows are no shorter
TINY = torch.finfo(torch.float32).tiny


def select_options(config: Any, settings: SensitivityParams, length: int) -> tuple[list[SelectOption], Rotation | None]:
    """Options of `settings` that fit documents of `length` tokens, and the model's rotation (None if unknown).

    Without a rotation, scores that need it are left out. A model with a sliding window has no options, because its
    cache cannot select.
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


def selected_keys(
    moments: Sequence[int],
    options: Sequence[SelectOption],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: int,
    scaling: float,
    rotation: Rotation | None,
) -> Tensor:
    """Keys that every option selects after each number of tokens in `moments`, bool `[option, kv_head, moment, key]`.

    query: `[query_head, token, head_dim]`; key, value: `[kv_head, token, dim]`. Candidates are the keys that have left
    the window or leave it within the next STEP tokens. Scores know the queries up to the moment.
    """
    found = torch.zeros(len(options), len(key), len(moments), key.shape[1], dtype=torch.bool, device=key.device)
    at = torch.arange(key.shape[1], device=key.device)
    stays = (at < sinks)[None, None]
    text = ScoreInputs(
        key[None], value[None], at[None, None], scaling, query[None], at[None], rotation, stays, in_order=True
    )
    ranked: dict[str, list[int]] = {}  # score -> moments at which an option has more candidates than slots for them
    for i, option in enumerate(options):
        for moment, seen in enumerate(moments):
            candidates = candidates_at(seen, option, sinks)
            if len(candidates) > option.selected:
                ranked.setdefault(option.score, []).append(moment)
            else:
                found[i, :, moment, candidates.start : candidates.stop] = True
    for name, some in ranked.items():
        order = sorted(set(some))
        prefixes = make_score(name).of_prefixes(text, [moments[moment] for moment in order])
        for moment, scores in zip(order, prefixes, strict=True):
            for i, option in enumerate(options):
                candidates = candidates_at(moments[moment], option, sinks)
                if option.score == name and len(candidates) > option.selected:
                    slots = best(scores[0, :, candidates.start : candidates.stop], option.selected)
                    found[i, :, moment].scatter_(1, slots + candidates.start, True)
    return found


def candidates_at(seen: int, option: SelectOption, sinks: int) -> range:
    """Positions of the keys that an option may select after `seen` tokens."""
    return range(seen)[sinks : max(seen - option.window + STEP, 0)]


def changes_along(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Sequence[int],
    sinks: int,
    scaling: float,
    sliding_window: int | None = None,
    options: Sequence[SelectOption] = (),
    selected: Tensor | None = None,
) -> Tensor:
    """Change of a KV head's outputs along a gradient, float32 `[window or option, kv_head, query]`.

    A change is the output over fewer keys minus the full output, summed over the query heads of the KV head. Windows
    come before options.

    gradient: `[kv_head, group, query, value_dim]`, with respect to the output. query: `[kv_head, group, query,
    head_dim]`, the
    last queries of the text. key, value: `[kv_head, key, dim]`, the whole text. selected: keys of each option, bool
    `[option, kv_head, key]`; they count for a query once they have left its window.
    """
    kv_heads, group, length, _ = query.shape
    keys = key.shape[1]
    scores = torch.bmm(query.float().flatten(1, 2) * scaling, key.float().mT)
    hide(scores.view(kv_heads * group, length, keys), keys - length, sliding_window)
    # [kv_head, weight or product, group, query, key], after as many columns of zeros as align all queries by distance
    terms = scores.new_empty(kv_heads, 2, group, length, length - 1 + keys)
    terms[..., : length - 1] = 0
    rows = terms[..., length - 1 :]
    weights, products = rows.unbind(1)
    weights.copy_(scores.softmax(-1).view_as(weights))
    torch.mul(weights, torch.bmm(gradient.float().flatten(1, 2), value.float().mT).view_as(weights), out=products)
    full, kept = products.sum(-1), rows[..., :sinks].sum(-1)
    rows[..., :sinks] = 0
    # Column c of `aligned` holds the keys at distance keys - 1 - c of every query.
    aligned = terms.as_strided((*terms.shape[:-1], keys), (*terms.stride()[:3], terms.stride(3) + 1, 1))
    found = torch.empty(len(windows) + len(options), kv_heads, length, device=query.device)
    inner = 0
    for window in sorted({*windows, *(option.window for option in options)}):
        outer = min(window, keys)
        ring = aligned[..., keys - outer : keys - inner]
        kept, inner = kept + ring.sum(-1), outer
        if window in windows:
            found[windows.index(window)] = change(kept, full)
        ring.zero_()
        of = [i for i, option in enumerate(options) if option.window == window]
        if of and selected is not None:
            older = keys - outer  # all later keys are in the window of every query
            columns = selected[of, :, :older].permute(1, 2, 0).to(terms.dtype)  # [kv_head, key, option]
            more = torch.bmm(rows.flatten(1, 3)[..., :older], columns).unflatten(1, (2, group, length))
            for i, option_sums in zip(of, more.unbind(-1), strict=True):
                found[len(windows) + i] = change(kept + option_sums, full)
    return found


def change(sums: Tensor, full: Tensor) -> Tensor:
    """Change along the gradient, summed over the group, from sums of weights and products over the remaining keys."""
    weights, products = sums.unbind(1)
    return (products / weights.clamp_min(TINY) - full).sum(1)
