"""A layer in which some heads hold keys chosen by content, and others may keep whatever a plan says.

Chosen or not, a group is read and written as a window is (`choosing_group`). The layer sees to it that groups choose
when they are due, before the column that would overwrite what they have to decide about, and that the queries which
their scores need are at hand: all of the prompt at its end, later the last few.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvcompress.cache.attend import Reading, read
from kvcompress.cache.head_group import Group
from kvcompress.cache.layer import CompressedLayer, Shared
from kvcompress.cache.ragged_layer import RaggedLayer
from kvcompress.cache.select.batched import choose, choose_due
from kvcompress.cache.select.head_group import ChoosingGroup
from kvcompress.cache.select.prefill import choose_of_prompt
from kvcompress.cache.select.recent_queries import RecentQueries
from kvcompress.cache.select.record import Choice
from kvcompress.cache.select.types import Evidence
from kvcompress.cache.storage import storage_bytes
from kvcompress.core.errors import CacheUseError, UnsupportedModelError
from kvcompress.core.retention import Retention
from kvcompress.scores.selection_rule import require_free_of_queries


class ChoosingLayer(RaggedLayer):
    """As `RaggedLayer`. Raises `UnsupportedModelError` where a sliding window of the model's own is shorter than what a
    head that chooses keeps, and for positions counted in the cache."""

    def __init__(self, kept: Sequence[Retention], shared: Shared, limit: int | None = None) -> None:
        super().__init__(kept, shared, limit)
        self._recent = RecentQueries(shared.choosing.observe)
        self._staged: list[Tensor] = []  # queries of the prompt so far
        self._scaling = 1.0
        if self._choosers and limit is not None:
            self.learn_limit(limit)
        if self._choosers and shared.rotation is not None:
            raise UnsupportedModelError(
                'positions="cache" cannot serve strategy select: between chosen keys there are gaps of any length'
            )

    def _keep(self, kept: Sequence[Retention]) -> None:
        super()._keep(kept)
        choosers = [(i, group) for i, group in enumerate(self._blocks) if isinstance(group, ChoosingGroup)]
        self._choosers = sorted(choosers, key=lambda of: of[1].wanted.score)  # that a prompt meets each score once
        asking = [group.score for _, group in self._choosers if group.score.needs_queries]
        self._asked = bool(asking)
        # How many of a prompt's queries are looked at, None for all.
        backs = [score.looks_back for score in asking]
        self._most = None if None in backs else max((back for back in backs if back is not None), default=0)

    def _group(self, keeps: Retention, heads: list[int]) -> Group:
        if keeps.chosen:
            return ChoosingGroup(keeps, heads, self.shared.meter, self.shared.choosing)
        return super()._group(keeps, heads)

    def learn_limit(self, limit: int) -> None:
        if self._choosers:
            raise UnsupportedModelError(
                f"keys chosen by content would leave the sight of this model's sliding window of {limit}: select there "
                "needs at least as many slots, which then hold all that can be seen"
            )
        super().learn_limit(limit)

    @property
    def evidence_nbytes(self) -> int:
        of_groups = sum(group.evidence_nbytes for _, group in self._choosers)
        return of_groups + storage_bytes((*self._recent.tensors, *self._staged))

    @property
    def standing_tensors(self) -> tuple[Tensor, ...]:
        return self._recent.tensors

    @property
    def record_past(self) -> bool:
        return self._record_past

    @record_past.setter
    def record_past(self, record: bool) -> None:
        if record:
            self.require_recordable()
        self._record_past = record
        for group in self._all_groups():
            group.recording = record

    def require_recordable(self) -> None:
        if self._choosers:
            raise CacheUseError(
                "strategy select cannot take back a choice of keys, which assisted decoding would need: decode without an"
                " assistant, or with a plan of windows"
            )

    def keeps_like(self, other: CompressedLayer) -> bool:
        if not isinstance(other, ChoosingLayer) or not super().keeps_like(other):
            return False
        mine, theirs = self.shared.choosing, other.shared.choosing
        return (mine.every, mine.observe, mine.scores) == (theirs.every, theirs.observe, theirs.scores)

    def record_choices(self, record: list[Choice] | None) -> None:
        """Note every choice in this list from now on, None for no longer."""
        for _, group in self._choosers:
            group.record = record

    def fill(self, keys: Tensor, values: Tensor, first: int = 0) -> None:
        for _, group in self._choosers:
            require_free_of_queries(group.wanted.score, self.shared.choosing)
        super().fill(keys, values, first)

    def fill_from_prompt(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> None:
        batch, heads, new, _ = keys.shape
        grouped = query.view(batch, heads, query.shape[1] // heads, new, -1)
        self._scaling = query.shape[-1] ** -0.5 if scale is None else scale
        if self._asked:
            self._stage(grouped)
        super().fill(keys, values)
        self._remember(grouped, 0)
        self._staged = []

    def due(self) -> Iterator[tuple[ChoosingGroup, Evidence]]:
        if self._in_prompt:
            return
        for i, group in self._choosers:
            if group.seen == group.due:
                ring = self._recent.tensors
                queries = self._recent.before(self.seen)[:, self._index_on(i, ring[0].device)] if ring else None
                yield group, self._evidence(group, queries)

    def reset(self) -> None:
        super().reset()
        self._recent.free()
        self._staged = []

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        self._recent.select_rows(rows)
        self._staged = [query.index_select(0, rows.to(query.device)) for query in self._staged]

    def can_crop(self, tokens: int) -> bool:
        staged = sum(query.shape[3] for query in self._staged)
        return super().can_crop(tokens) and (tokens == 0 or staged in (0, self.seen))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        # The last queries need nothing: those of the same columns will come to lie over what is taken back.
        if self._staged:
            self._staged = [torch.cat(self._staged, dim=3)[:, :, :, : self.seen]]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
        self._scaling = query.shape[-1] ** -0.5 if reading.scale is None else reading.scale
        if self._in_prompt:
            return super()._attend(query, keys, values, reading)
        self.shared.beside.join()  # a prompt may have ended within this very pass
        first = self.seen
        choose_due([self])  # the cache has asked all layers, unless a prompt has just ended
        if keys.shape[2] == 1:
            out = super()._attend(query, keys, values, reading)
        else:
            out = self._attend_many(query, keys, values, reading)
        self._remember(query, first)
        return out

    def _attend_prompt(self, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
        if self._asked:
            ends = self.seen + keys.shape[2] >= (self.shared.prompt_length or 0)
            self._stage(query.detach() if ends else query.detach().clone())
        out = super()._attend_prompt(query, keys, values, reading)
        self._remember(query, self.seen)
        if not self._in_prompt:
            self._staged = []
        return out

    def _stage(self, query: Tensor) -> None:
        self._staged.append(query)
        if self._most is not None and len(self._staged) > 1:
            self._staged = [torch.cat(self._staged, dim=3)[:, :, :, -self._most :].clone()]

    def _attend_many(self, query: Tensor, keys: Tensor, values: Tensor, reading: Reading) -> Tensor:
        queries = query
        if self._asked and self.seen:
            queries = torch.cat((self._recent.before(self.seen), query), dim=3)
        out = values.new_zeros(*query.shape[:-1], values.shape[-1])
        for i, group in enumerate(self._blocks):
            index = self._index_on(i, keys.device)
            new = query[:, index], keys[:, index], values[:, index]
            out[:, index] = (
                torch.cat(list(self._pieces(group, *new, queries[:, index], reading)), dim=3)
                if isinstance(group, ChoosingGroup)
                else read(group, *new, reading)
            )
        self.seen += keys.shape[2]
        return out

    def _pieces(
        self, group: ChoosingGroup, query: Tensor, keys: Tensor, values: Tensor, queries: Tensor, reading: Reading
    ) -> Iterator[Tensor]:
        """Read from choice to choice; `queries` are those at hand, `query` the last of them."""
        begin, new = 0, query.shape[3]
        while begin < new:
            if group.seen == group.due:
                choose([group], [self._evidence(group, queries[:, :, :, : queries.shape[3] - new + begin])])
            end = min(new, begin + group.due - group.seen)
            yield read(group, query[:, :, :, begin:end], keys[:, :, begin:end], values[:, :, begin:end], reading)
            begin = end

    def _evidence(self, group: ChoosingGroup, queries: Tensor | None) -> Evidence:
        if not group.score.needs_queries:
            queries = None
        elif queries is not None:
            queries = queries[:, :, :, -self.shared.choosing.observe :]
        return Evidence(queries, self._scaling, self.shared.padding, self.shared.choosing.rotation)

    def _evidence_of_prompt(self) -> Evidence:
        if len(self._staged) > 1:
            self._staged = [torch.cat(self._staged, dim=3)]
        queries = self._staged[0] if self._staged else None
        return Evidence(queries, self._scaling, self.shared.padding, self.shared.choosing.rotation)

    def _remember(self, query: Tensor, first: int) -> None:
        if not self._asked:
            return
        query = query.detach()
        column = self.shared.fused.last_column(query.device, first + 1) if query.shape[3] == 1 else None
        if column is None:
            self._recent.store(query, first)
        else:
            self._recent.store_at(query, column)

    def _store(self, keys: Tensor, values: Tensor) -> None:
        new, padded = keys.shape[2], self.shared.padding.longest > 0
        due = [
            (i, group) for i, group in self._choosers if group.seen + new > group.due
        ]  # they hold less than a prompt
        later = [] if padded else [group for _, group in due]
        for i, group in enumerate(self._blocks):
            if group in later:
                group.expect(keys, values)
            else:
                self._append(i, keys, values)
        if not due:
            return
        evidence = self._evidence_of_prompt()
        with self.shared.beside.work(keys, values, *self._staged):
            if later:
                choose_of_prompt(later, keys, values, evidence)
                return
            for i, group in due:
                index = self._index_on(i, keys.device)
                group.choose_of_padded_prompt(keys[:, index], values[:, index], evidence.of(index))
