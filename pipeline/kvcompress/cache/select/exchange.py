"""Selection among held keys: while streaming and decoding, and at the end of a padded prompt for rows that fit.

A selection is about a hundred small operations, however few heads take part. Groups with the same layout and score are
due at the same time, so before a pass the groups of all layers select together: their keys are concatenated and scored
as one large group, and each group swaps its own rows. (Selecting group by group made decode steps of a plan with many
kinds of heads 20 to 35 % slower on an H200.) A score looks at one KV head at a time, so this changes no selection.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcompress.cache.padding import Padding
from kvcompress.cache.select.head_group import SelectGroup
from kvcompress.cache.select.records import SelectionInputs, SlotState, SlotSwap
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs
from kvcompress.scores.topk import first, ranking

LARGEST = 2**26  # bytes of K and V concatenated at a time, unless one group has more


class HasDueGroups(Protocol):
    """Layer that reports the groups that must select before the next pass, with the inputs of their scores."""

    def due(self) -> Sequence[tuple[SelectGroup, SelectionInputs]]: ...


def select_due(layers: Sequence[HasDueGroups]) -> None:
    """Run all due selections of these layers."""
    due: dict[Hashable, list[tuple[SelectGroup, SelectionInputs]]] = {}
    for layer in layers:
        for group, inputs in layer.due():
            due.setdefault(group.layout_key(inputs), []).append((group, inputs))
    for members in due.values():
        step = max(1, LARGEST // max(group.nbytes for group, _ in members))
        for begin in range(0, len(members), step):
            groups, inputs_of = zip(*members[begin : begin + step], strict=True)
            select(groups, inputs_of)
            for group in groups:
                group.close_selection()


def select(groups: Sequence[SelectGroup], inputs: Sequence[SelectionInputs]) -> None:
    """Select anew in groups with equal `layout_key`, all slots of which are in use, and swap their rows."""
    layout, padding = groups[0], inputs[0].padding
    queries = [of.queries for of in inputs if of.queries is not None]
    joined = replace(inputs[0], queries=_join(queries) if queries else None)
    keys, values = (_join(tensors) for tensors in zip(*(group.read() for group in groups), strict=True))
    states = [group.state for group in groups if group.state is not None]
    before, received = None, None
    if states:
        before = _join([state.positions for state in states])
        kept = [state.received for state in states if state.received is not None]
        if kept:
            fresh = layout.columns(keys.device) >= layout.selected_at
            total, count = _join([of.total for of in kept]), _join([of.queries for of in kept])
            received = AttentionTotals(total.masked_fill(fresh, 0), count.masked_fill(fresh, 0))
    positions = layout.slot_positions(before, padding, keys.device).expand(-1, keys.shape[1], -1)
    scored = _score_inputs(layout, keys, values, positions, joined, received)
    totals = layout.score.received(scored)
    swap = _swap(layout, layout.score(scored, totals), positions, padding, totals)
    begin = 0
    for group in groups:
        heads = slice(begin, begin + len(group.heads))
        # With memory of its own for the state, which is kept.
        after = swap.after.heads(heads) if len(groups) > 1 else swap.after
        group.swap(SlotSwap(swap.source[:, heads], swap.into[:, heads], after))
        begin = heads.stop


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate heads."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), 1)


def _score_inputs(
    layout: SelectGroup,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    inputs: SelectionInputs,
    received: AttentionTotals | None,
) -> ScoreInputs:
    sinks, window = layout.requested[:2]
    pads, device = inputs.padding.on(keys.device), keys.device
    queries, at = inputs.queries, None
    if queries is not None:
        if layout.score.accumulates:
            queries = queries[:, :, :, -(layout.seen - layout.selected_at) :]
        at = torch.arange(layout.seen - queries.shape[3], layout.seen, device=device)[None]
        at = at if pads is None else at - pads
        queries = queries.flatten(1, 2)
    until = layout.seen - window + layout.every
    stays = (positions < sinks) | (positions >= (until if pads is None else (until - pads)[:, None]))
    return ScoreInputs(
        keys, values, positions, inputs.scaling, queries, at, inputs.rotation, stays=stays, earlier=received
    )  # fmt: skip


def _swap(
    layout: SelectGroup, scores: Tensor, positions: Tensor, padding: Padding, received: AttentionTotals | None
) -> SlotSwap:
    """Return the swap that puts the best keys into the slots of selected keys; all `[batch, head, slot]`."""
    sinks, _, chosen, _ = layout.requested
    device, end, leaves = scores.device, sinks + chosen, layout.next_slots(scores.device)
    positions = positions.expand(scores.shape)
    ranked, empty = torch.cat((scores[..., sinks:end], scores[..., leaves]), dim=-1), None
    if padding.longest:
        # In a padded row the ring may hold pads, and second copies of keys in the slots before it.
        empty = pad((layout.positions(padding, device)[:, leaves] < end)[:, None], (chosen, 0))
    worst = ranking(ranked, empty).flip(-1)
    enters = torch.ones_like(ranked, dtype=torch.bool).scatter_(-1, worst[..., : layout.every], False)[..., chosen:]
    # Pair i: the i-th worst selected key that leaves and the i-th oldest window key that enters.
    pairs = min(chosen, layout.every)
    leave = worst.gather(-1, first(worst < chosen, pairs)) + sinks
    enter = leaves[first(enters, pairs)]
    real = torch.arange(pairs, device=device) < enters.sum(-1, keepdim=True)
    into, source = torch.cat((leave, enter), dim=-1), torch.cat((enter, leave), dim=-1)
    source = torch.where(torch.cat((real, real), dim=-1), source, into)
    slots = torch.arange(scores.shape[-1], device=device)
    moved = slots.expand(scores.shape).scatter(-1, into, source)
    if padding.longest:  # the position that a slot not reached yet will hold
        positions = torch.where((slots < end) & (positions < 0), slots, positions)
    after = SlotState(positions.gather(-1, moved).int(), None if received is None else received.take(moved))
    return SlotSwap(source, into, after)
