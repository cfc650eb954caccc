"""A group whose heads hold keys chosen by content; `choices` says by which rule.

To whoever reads or writes it, it is a group of s + k sinks and a window of w, ring and all: the chosen keys lie in the
last k of these slots that the ring never meets. All that it has of its own happens between two passes: it exchanges rows
of those slots with rows of the ring. `positions` goes on saying what a slot's column would be without that, which is
what decides how long a row of the ring is seen; `places` says what really lies there.
"""

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvcompress.cache.head_group import Group
from kvcompress.cache.padding import Padding
from kvcompress.cache.select.record import Choice
from kvcompress.cache.select.types import Evidence, Exchange, Known
from kvcompress.cache.storage import Meter, storage_bytes
from kvcompress.core.errors import CacheUseError
from kvcompress.core.retention import Retention
from kvcompress.scores.inputs import AttentionTotals, ScoreInputs
from kvcompress.scores.selection_rule import SelectionRule
from kvcompress.scores.topk import best, first, ranking


class ChoosingGroup(Group):
    """Storage of the KV heads `heads`, which all keep `wanted`; `due` is the column before which they choose next, `known`
    what is known since they last did."""

    def __init__(self, wanted: Retention, heads: Iterable[int], meter: Meter, choosing: SelectionRule) -> None:
        super().__init__(Retention(wanted.sinks + wanted.chosen, wanted.window), heads, meter)
        self.wanted, self.score = wanted, choosing.score(wanted.score)
        self.every = min(choosing.every, wanted.window)
        self.record: list[Choice] | None = None
        self._begin()

    def _begin(self) -> None:
        assert self.capacity is not None
        self.due = self.capacity
        self._chosen_at = 0
        self.known: Known | None = None

    @property
    def evidence_nbytes(self) -> int:
        """Bytes kept besides K and V."""
        return storage_bytes(self.known.tensors) if self.known else 0

    def places(self, padding: Padding, device: torch.device) -> Tensor:
        """The real position of the key in each slot in use, int64 `[batch or 1, head, slot]`; -1 as in `positions`."""
        if self.known is None:
            return self.positions(padding, device)[:, None].expand(-1, len(self.heads), -1)
        return self._places(self.known.places.to(device), padding)

    def _places(self, before: Tensor, padding: Padding) -> Tensor:
        """The same, where it was `before` at the last choice, `[batch, any heads, slot]`."""
        expected = self.positions(padding, before.device)[:, None]
        old = self.columns(before.device) < self._chosen_at
        return torch.where(old, before.long(), expected).masked_fill(expected < 0, -1)

    def held_positions(self, row: int, padding: Padding) -> list[list[int]]:
        places = self.places(padding, torch.device("cpu"))
        return [sorted(of[of >= 0].tolist()) for of in places[row if len(places) > 1 else 0]]

    def likeness(self, evidence: Evidence) -> Hashable:
        """What is the same in groups that can choose as one."""
        keys, values = self.block.tensors
        queries = () if evidence.queries is None else tuple(evidence.queries.shape[2:])
        shape = keys.shape[0], keys.shape[3], values.shape[3], *queries
        counts = self.seen, self._chosen_at, self.every, self.known is None
        return self.wanted, self.score, *counts, *shape, keys.dtype, keys.device, evidence.scaling

    def weigh(self, keys: Tensor, values: Tensor, evidence: Evidence, known: Known | None) -> Exchange:
        """What heads like these do, any number of them, if all slots are in use and hold these keys and values."""
        if known is None:
            places, earlier = self.positions(evidence.padding, keys.device)[:, None].expand(-1, keys.shape[1], -1), None
        else:
            places, earlier = self._places(known.places, evidence.padding), known.earlier
        if earlier is not None:
            fresh = self.columns(keys.device) >= self._chosen_at
            earlier = AttentionTotals(earlier.total.masked_fill(fresh, 0), earlier.queries.masked_fill(fresh, 0))
        held = self._held(keys, values, places, evidence, earlier)
        received = self.score.received(held)
        return self._exchange(self.score(held, received), places, evidence.padding, received)

    def choose_of_padded_prompt(self, keys: Tensor, values: Tensor, evidence: Evidence) -> None:
        """Take the best of all columns of a prompt, `[batch, head, column, head_dim]`, which has just been appended."""
        sinks, window, chosen, _ = self.wanted
        assert self.capacity is not None
        seen, device, pads = self.seen, keys.device, evidence.padding.on(keys.device)
        assert pads is not None  # without any, see `choosing_prompt`
        columns = torch.arange(seen, device=device)
        places = (columns - pads)[:, None].clamp_min(-1)  # [batch, 1, column]
        held = self._held(keys, values, places, evidence, None)
        received = self.score.received(held)
        scores = self.score(held, received)
        # A row that has slots for all its tokens has them there already.
        short = (seen - pads <= self.capacity)[:, None]
        older = (places >= sinks) & (places < (seen - pads - window)[:, None])
        index = best(scores, chosen, torch.where(short, columns >= chosen, ~older))
        there = (pads + torch.arange(sinks, sinks + chosen, device=device)).clamp_max(seen - 1)[:, None]
        index = torch.where(short, there, index)
        at = index[..., None]
        self.block.write(
            sinks, *(tensor.gather(2, at.expand(*at.shape[:3], tensor.shape[3])) for tensor in (keys, values))
        )
        # Which column lies in which slot, and with it its position, its score and what it received.
        shape = (*index.shape[:2], -1)
        front = (pads + columns[:sinks]).clamp_max(seen - 1)[:, None]
        ring = self.columns(device)[sinks + chosen :]
        source = torch.cat((front.expand(shape), index, ring.expand(shape)), dim=-1)
        places = (source - pads[:, None]).masked_fill(self.positions(evidence.padding, device)[:, None] < 0, -1)
        earlier = None if received is None else received.take(source)
        self.settle(self._exchange(scores.gather(-1, source), places, evidence.padding, earlier))

    def _held(
        self,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
        evidence: Evidence,
        earlier: AttentionTotals | None,
    ) -> ScoreInputs:
        sinks, window = self.wanted[:2]
        pads, device = evidence.padding.on(keys.device), keys.device
        queries, at = evidence.queries, None
        if queries is not None:
            if self.score.accumulates:
                queries = queries[:, :, :, -(self.seen - self._chosen_at) :]
            at = torch.arange(self.seen - queries.shape[3], self.seen, device=device)[None]
            at = at if pads is None else at - pads
            queries = queries.flatten(1, 2)
        until = self.seen - window + self.every
        stays = (places < sinks) | (places >= (until if pads is None else (until - pads)[:, None]))
        return ScoreInputs(
            keys,
            values,
            places,
            evidence.scaling,
            queries,
            at,
            evidence.rotation,
            stays=stays,
            earlier=earlier,
        )

    def _exchange(self, scores: Tensor, places: Tensor, padding: Padding, earlier: AttentionTotals | None) -> Exchange:
        """Which rows to exchange so that the best lie in the slots of chosen keys; all `[.., head, slot]`."""
        sinks, _, chosen, _ = self.wanted
        device, end, goes = scores.device, sinks + chosen, self._goes(scores.device)
        places = places.expand(scores.shape)
        ranked, none = torch.cat((scores[..., sinks:end], scores[..., goes]), dim=-1), None
        if padding.longest:
            # In a padded row the ring may hold pads, and second copies of what lies in the slots before it.
            empty = (self.positions(padding, device)[:, goes] < end)[:, None]
            none = pad(empty, (chosen, 0))
        worst = ranking(ranked, none).flip(-1)
        enter = torch.ones_like(ranked, dtype=torch.bool).scatter_(-1, worst[..., : self.every], False)[..., chosen:]
        # The i-th pair: of those that have to go the i-th worst, of those that enter the i-th oldest.
        pairs = min(chosen, self.every)
        leave = worst.gather(-1, first(worst < chosen, pairs)) + sinks
        come = goes[first(enter, pairs)]
        real = torch.arange(pairs, device=device) < enter.sum(-1, keepdim=True)
        into, source = torch.cat((leave, come), dim=-1), torch.cat((come, leave), dim=-1)
        source = torch.where(torch.cat((real, real), dim=-1), source, into)
        slots = torch.arange(scores.shape[-1], device=device)
        moved = slots.expand(scores.shape).scatter(-1, into, source)
        if padding.longest:  # of a row's slots not reached yet it is known what they will hold
            places = torch.where((slots < end) & (places < 0), slots, places)
        after = Known(places.gather(-1, moved).int(), None if earlier is None else earlier.take(moved))
        return Exchange(source, into, after)

    def settle(self, exchange: Exchange) -> None:
        """Do what these heads have chosen to do."""
        self.block.move(exchange.source, exchange.into)
        self._know(exchange.after)

    def expect(self, keys: Tensor, values: Tensor) -> None:
        """Make room for all that these heads keep of a prompt `[batch, any heads, column, head_dim]`; `hold` fills it."""
        heads = slice(len(self.heads))
        self._reserve(keys.shape[2], keys[:, heads], values[:, heads])
        self.seen = keys.shape[2]

    def hold(self, keys: Tensor, values: Tensor, source: Tensor, earlier: AttentionTotals | None) -> None:
        """Let slot i hold the column `source[.., i]` of a prompt without pads, `[batch, head, column, head_dim]`."""
        at = source[..., None]
        self.block.write(0, *(tensor.gather(2, at.expand(-1, -1, -1, tensor.shape[3])) for tensor in (keys, values)))
        self._know(Known(source.int(), earlier))

    def _goes(self, device: torch.device) -> Tensor:
        """The slots that the next columns will overwrite until the choice after this one, in order, `[slot]`."""
        sinks, window, chosen, _ = self.wanted
        end = sinks + chosen
        return (torch.arange(self.every, device=device) + (self.seen - window - end)) % window + end

    def _know(self, after: Known) -> None:
        self.known = after
        if self.record is not None:
            (sinks, _, chosen, _), now = self.wanted, after.places.clone()
            leaving = now[..., self._goes(now.device)]
            self.record.append(Choice(self.seen, tuple(self.heads), now[..., sinks : sinks + chosen], leaving))
        self._chosen_at, self.due = self.seen, self.seen + self.every

    def can_crop(self, tokens: int) -> bool:
        return tokens == 0 or (self.known is None and super().can_crop(tokens))

    def crop(self, tokens: int) -> None:
        if not self.can_crop(tokens):
            raise CacheUseError(f"a KV head that has chosen among its keys cannot take back {tokens} tokens")
        super().crop(tokens)

    def reset(self) -> None:
        super().reset()
        self._begin()

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if self.known is not None:
            self.known = self.known.rows(rows.to(self.known.places.device))
