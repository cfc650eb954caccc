"""A layer in which some heads hold keys selected by content, and others keep what a plan says.

A group that selects is read and written as a window (`select.head_group`). The layer runs selections when they are due,
before the column that would overwrite a candidate, and stores the queries that scores need: all queries of the prompt
until its end, later the last few.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvcompress.cache.attend import AttendOptions, attend_group
from kvcompress.cache.head_group import HeadGroup
from kvcompress.cache.layer import CacheState, CompressedLayer
from kvcompress.cache.ragged_layer import RaggedLayer
from kvcompress.cache.select.ada_kv import AdaptiveBudgets
from kvcompress.cache.select.exchange import select, select_due
from kvcompress.cache.select.head_group import SelectGroup
from kvcompress.cache.select.prefill import select_in_prompt
from kvcompress.cache.select.recent_queries import RecentQueries
from kvcompress.cache.select.records import SelectionInputs, SelectionRecord
from kvcompress.cache.storage import storage_bytes
from kvcompress.core.errors import CacheUseError, UnsupportedModelError
from kvcompress.core.retention import Retention
from kvcompress.scores.selection_rule import require_free_of_queries


class SelectLayer(RaggedLayer):
    """Layer whose KV heads keep `requested[kv_head]`, some of them by selection.

    With `budgets` all heads request the same, and the end of a prompt divides their slots anew. Raises
    `UnsupportedModelError` if the model's sliding window is shorter than what a selecting head keeps, and for positions
    counted inside the cache.
    """

    def __init__(
        self,
        requested: Sequence[Retention],
        shared: CacheState,
        sliding_window: int | None = None,
        budgets: AdaptiveBudgets | None = None,
    ) -> None:
        self.budgets = budgets
        self._record: list[SelectionRecord] | None = None
        super().__init__(requested, shared, sliding_window)
        self._recent = RecentQueries(shared.selection_rule.observe)
        self._prompt_queries: list[Tensor] = []
        self._scaling = 1.0
        if self._selecting and sliding_window is not None:
            self.learn_sliding_window(sliding_window)
        if self._selecting and shared.rotation is not None:
            raise UnsupportedModelError(
                'positions="cache" cannot serve strategy select: selected keys lie at any distance from each other'
            )

    def _assign(self, retentions: Sequence[Retention]) -> None:
        super()._assign(retentions)
        selecting = [group for group in self._groups if isinstance(group, SelectGroup)]
        self._selecting = sorted(selecting, key=lambda group: group.requested.score)  # adjacent groups share scores
        self.record_selections(self._record)
        asking = [group.score for group in self._selecting if group.score.needs_queries]
        self._needs_queries = bool(asking)
        # The number of a prompt's queries that scores look at, None for all.
        backs = [score.looks_back for score in asking]
        self._most = None if None in backs else max((back for back in backs if back is not None), default=0)

    def _new_group(self, retention: Retention, heads: list[int]) -> HeadGroup:
        if retention.chosen:
            return SelectGroup(retention, heads, self.shared.meter, self.shared.selection_rule)
        return super()._new_group(retention, heads)

    def learn_sliding_window(self, sliding_window: int) -> None:
        if self._selecting:
            raise UnsupportedModelError(
                f"selected keys would leave this model's sliding window of {sliding_window}: strategy select needs at"
                " least as many slots there"
            )
        super().learn_sliding_window(sliding_window)

    @property
    def evidence_nbytes(self) -> int:
        of_groups = sum(group.state_nbytes for group in self._selecting)
        return of_groups + storage_bytes((*self._recent.tensors, *self._prompt_queries))

    @property
    def tensors(self) -> list[Tensor]:
        return [*super().tensors, *self._recent.tensors]

    def require_recordable(self) -> None:
        if self._selecting:
            raise CacheUseError(
                "strategy select cannot take back a selection, which assisted decoding needs: decode without an"
                " assistant, or with a plan of windows"
            )

    def keeps_like(self, other: CompressedLayer) -> bool:
        if not isinstance(other, SelectLayer) or not super().keeps_like(other):
            return False
        mine, theirs = self.shared.selection_rule, other.shared.selection_rule
        same = (mine.every, mine.observe, mine.scores) == (theirs.every, theirs.observe, theirs.scores)
        return same and self.budgets == other.budgets

    def record_selections(self, record: list[SelectionRecord] | None) -> None:
        """Append every selection to `record` from now on; None stops recording."""
        self._record = record
        for group in self._selecting:
            group.record = record

    def fill(self, keys: Tensor, values: Tensor, first: int = 0) -> None:
        for group in self._selecting:
            require_free_of_queries(group.requested.score, self.shared.selection_rule)
        super().fill(keys, values, first)

    def fill_from_prompt(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> None:
        batch, heads, new, size = keys.shape
        grouped = query.view(batch, heads, query.shape[1] // heads, new, -1)
        self._scaling = size**-0.5 if scale is None else scale
        if self._needs_queries:
            self._prompt_queries = [grouped]
        super().fill(keys, values)
        self._remember(grouped, 0)
        self._prompt_queries = []

    def due(self) -> list[tuple[SelectGroup, SelectionInputs]]:
        """Return the groups that must select before the next pass, with the inputs of their scores."""
        if self._in_prompt:
            return []
        due = [group for group in self._selecting if group.seen == group.due]
        return [(group, self._inputs(group, self._recent_of(group, self.seen))) for group in due]

    def reset(self) -> None:
        super().reset()
        self._recent.free()
        self._prompt_queries = []
        if self.budgets is not None:
            self._assign(self.requested)

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        self._recent.select_rows(rows)
        self._prompt_queries = [query.index_select(0, rows.to(query.device)) for query in self._prompt_queries]

    def can_crop(self, tokens: int) -> bool:
        staged = sum(query.shape[3] for query in self._prompt_queries)
        return super().can_crop(tokens) and (tokens == 0 or staged in (0, self.seen))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        # The ring of recent queries needs nothing: new queries of the same columns overwrite those taken back.
        if self._prompt_queries:
            self._prompt_queries = [torch.cat(self._prompt_queries, dim=3)[:, :, :, : self.seen]]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
        self._scaling = query.shape[-1] ** -0.5 if options.scale is None else options.scale
        if self._in_prompt:
            return super()._attend(query, keys, values, options)
        first = self.seen
        select_due([self])  # the cache has asked all layers before, unless the prompt ended within this pass
        out = super()._attend(query, keys, values, options)
        self._remember(query, first)
        return out

    def _attend_group(
        self, group: HeadGroup, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions
    ) -> Tensor:
        if not isinstance(group, SelectGroup) or query.shape[3] == 1:
            return super()._attend_group(group, query, keys, values, options)
        return torch.cat(list(self._pieces(group, query, keys, values, options)), dim=3)

    def _pieces(
        self, group: SelectGroup, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions
    ) -> Iterator[Tensor]:
        """Attend from one selection to the next."""
        before = self._recent_of(group, self.seen) if self.seen else None
        queries = query if before is None else torch.cat((before, query), dim=3)
        begin, new, earlier = 0, query.shape[3], queries.shape[3] - query.shape[3]
        while begin < new:
            if group.seen == group.due:
                select([group], [self._inputs(group, queries[:, :, :, : earlier + begin])])
                group.close_selection()
            end = min(new, begin + group.due - group.seen)
            piece = query[:, :, :, begin:end], keys[:, :, begin:end], values[:, :, begin:end]
            yield attend_group(group, *piece, options)
            begin = end

    def _attend_prompt(self, query: Tensor, keys: Tensor, values: Tensor, options: AttendOptions) -> Tensor:
        if self._needs_queries:
            ends = self.seen + keys.shape[2] >= (self.shared.prompt_length or 0)
            self._prompt_queries.append(query.detach() if ends else query.detach().clone())
            if self._most is not None and len(self._prompt_queries) > 1:
                self._prompt_queries = [torch.cat(self._prompt_queries, dim=3)[:, :, :, -self._most :].clone()]
        out = super()._attend_prompt(query, keys, values, options)
        self._remember(query, self.seen)
        if not self._in_prompt:
            self._prompt_queries = []
        return out

    def _recent_of(self, group: SelectGroup, column: int) -> Tensor | None:
        """Return the stored queries before `column` of a group's heads, None if its score needs none."""
        if not group.score.needs_queries or not self._recent.tensors:
            return None
        return self._recent.before(column)[:, group.index(self._recent.tensors[0].device)]

    def _inputs(self, group: SelectGroup, queries: Tensor | None) -> SelectionInputs:
        rule = self.shared.selection_rule
        recent = queries[:, :, :, -rule.observe :] if queries is not None and group.score.needs_queries else None
        return SelectionInputs(recent, self._scaling, self.shared.padding, rule.rotation)

    def _inputs_of_prompt(self) -> SelectionInputs:
        if len(self._prompt_queries) > 1:
            self._prompt_queries = [torch.cat(self._prompt_queries, dim=3)]
        queries = self._prompt_queries[0] if self._prompt_queries else None
        return SelectionInputs(queries, self._scaling, self.shared.padding, self.shared.selection_rule.rotation)

    def _remember(self, query: Tensor, first: int) -> None:
        """Store the queries of the columns `first...` if scores need them."""
        if not self._needs_queries:
            return
        query = query.detach()
        column = self.shared.fused.last_column(query.device, first + 1) if query.shape[3] == 1 else None
        if column is None:
            self._recent.store(query, first)
        else:
            self._recent.store_at(query, column)

    def _store(self, keys: Tensor, values: Tensor) -> None:
        new = keys.shape[2]
        if self._in_prompt and self.budgets is not None and new > self._selecting[0].due:
            self._assign(self.budgets.divide(self._selecting[0], keys, values, self._inputs_of_prompt()))
        due = [group for group in self._selecting if group.seen + new > group.due]  # a prompt that exceeds their slots
        for group in self._groups:
            if group not in due:
                index = group.index(keys.device)
                group.append(keys[:, index], values[:, index], self.shared.padding)
        if due:
            select_in_prompt(due, keys, values, self._inputs_of_prompt())
