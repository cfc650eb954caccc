"""Caches whose storage stands still while a model decodes, as a captured decode step needs it.

A CUDA graph replays launches at fixed addresses and runs no Python. So all room is made beforehand, the device counts
the tokens seen for itself, and what a replay leaves out in Python, the counts, is done by hand after it. `Standing`
does this for a compressed cache, `StandingDense` for transformers' `StaticCache`, its dense twin.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from kvcompress.cache.attend import Reading, sees_all
from kvcompress.cache.fused_decode import Desk
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.errors import CacheUseError

FOREVER = 2**31  # a column that no text reaches


class StandingCache(ABC):
    """What a loop of decode steps asks of a cache. `room`: tokens in all that it can hold without moving, None for any."""

    room: int | None
    batch: int

    @property
    @abstractmethod
    def seen(self) -> int:
        """Tokens seen (columns, where the batch is padded)."""

    @property
    def pads(self) -> Tensor | None:
        """Pad columns of every row, `[batch]`, None without padding."""
        return None

    @property
    def recording(self) -> bool:
        """Whether steps have to note what they overwrite, which a captured one does not."""
        return False

    def reading(self) -> AbstractContextManager[None]:
        """Where the model's passes without a mask are right."""
        return nullcontext()

    def open(self) -> None:  # noqa: B027
        """Before a step, outside what is captured: let the device's count be that of Python, and keys be chosen."""

    @abstractmethod
    def advance(self) -> None:
        """Within a step, before the model: count where a captured step would count."""

    @abstractmethod
    def count(self) -> None:
        """After a replay: what it left out in Python."""

    @abstractmethod
    def can_be_captured(self) -> bool:
        """Whether, after a step that was not captured, the next ones would be launches alike."""

    @abstractmethod
    def pieces(self) -> list[object]:
        """All that a captured step has the address of; it may replay only while these are the same objects."""

    @abstractmethod
    def undo(self) -> Callable[[], None]:
        """What brings Python's counts back to those of now."""

    def require(self, new: int, batch: int) -> None:
        """Raise `CacheUseError` unless `batch` rows can have `new` more tokens."""
        if batch != self.batch:
            raise CacheUseError(f"the cache holds a batch of {self.batch}, but got tokens of {batch} rows")
        if self.room is not None and self.seen + new > self.room:
            raise CacheUseError(
                f"the cache has room for {self.room} tokens and saw {self.seen}, so {new} more do not fit: make a new"
                " decoder with more room"
            )


class Standing(StandingCache):
    """A `RaggedCache` with room for `new` more tokens. Raises `CacheUseError` where it cannot make any."""

    def __init__(self, cache: RaggedCache, new: int, device: torch.device) -> None:
        cache.reserve(cache.seen + new)
        self.cache, self.device, self.batch = cache, device, cache.batch_size
        self.layers = cache.compressed_layers
        self.groups = [group for layer in self.layers for group in layer.groups]
        self.room = min((group.block.slots for group in self.groups if group.capacity is None), default=None)
        self._before = 0  # launches that stored their own column, before this step

    @property
    def seen(self) -> int:
        return self.cache.seen

    @property
    def pads(self) -> Tensor | None:
        return self.cache.shared.padding.columns

    @property
    def recording(self) -> bool:
        return any(layer.record_past for layer in self.layers)

    def reading(self) -> AbstractContextManager[None]:
        return self.cache.shared.padding.known()

    def _desk(self) -> Desk:
        return self.cache.shared.fused.desk(self.device, self.seen)

    def open(self) -> None:
        self.cache.choose_due()
        self._before = self._desk().appended

    def advance(self) -> None:
        self._desk().advance()

    def count(self) -> None:
        for layer in self.layers:
            layer.count()
        self.cache.shared.fused.desk(self.device, self.seen - 1).written += 1

    def can_be_captured(self) -> bool:
        """True if one launch served every layer, stored its column, and nothing that decides this can change."""
        padding, longest = self.cache.shared.padding, self.cache.shared.padding.longest
        served = self._desk().appended - self._before == sum(bool(layer.groups) for layer in self.layers)
        if not served or not all(group.takes_plainly(padding) for group in self.groups):
            return False
        rotation = self.cache.shared.rotation
        for layer in self.layers:
            reading = Reading(padding, None, 0.0, layer.limit, rotation)
            if not all(sees_all(group, FOREVER, reading) for group in layer.groups):
                return False
        # The step in which the last pads leave a ring has another launch than the one before.
        return not longest or all(
            group.capacity is None or self.seen + 1 != group.capacity + longest for group in self.groups
        )

    def pieces(self) -> list[object]:
        tensors = [tensor for group in self.groups for tensor in group.block.tensors]
        tensors += [tensor for layer in self.layers for tensor in layer.standing_tensors]
        return [self.pads, self._desk().scratch, *tensors]

    def undo(self) -> Callable[[], None]:
        desk = self._desk()
        written = desk.written
        layers = [(layer, layer.seen) for layer in self.layers]
        groups = [(group, group.seen) for group in self.groups]

        def back() -> None:
            desk.written = written
            for layer, seen in layers:
                layer.seen = seen
            for group, seen in groups:
                group.seen = seen

        return back


class StandingDense(StandingCache):
    """A filled `StaticCache`, which counts on the device by itself; Python's count starts from it and is kept here.

    Raises `CacheUseError` for one that is empty, was filled in inference mode or has layers with a sliding window.
    """

    def __init__(self, cache: StaticCache, new: int, device: torch.device) -> None:
        if any(type(layer) is not StaticLayer for layer in cache.layers):
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise CacheUseError(f"the static cache has layers of {' and '.join(kinds)}, expected StaticLayer alone")
        if not all(layer.is_initialized for layer in cache.layers):
            raise CacheUseError("the static cache holds no tokens yet: run the prompt first")
        if any(layer.keys.is_inference() for layer in cache.layers):
            raise CacheUseError("the static cache was filled in inference mode, expected torch.no_grad()")
        self.cache, self.device = cache, device
        self.batch, self.room = cache.layers[0].keys.shape[0], cache.layers[0].max_cache_len
        self._seen = int(cache.get_seq_length())
        self.require(new, self.batch)

    @property
    def seen(self) -> int:
        return self._seen

    def advance(self) -> None:
        self._seen += 1

    count = advance

    def can_be_captured(self) -> bool:
        return True

    def pieces(self) -> list[object]:
        return [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]

    def undo(self) -> Callable[[], None]:
        seen = self._seen

        def back() -> None:
            self._seen = seen

        return back
