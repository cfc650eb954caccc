"""Greedy decoding without host cost: one decode step is captured in a CUDA graph and replayed.

```python
with compressor.attached(model):
    cache = compressor.new_cache(model.config)
    logits = model(prompt, past_key_values=cache, use_cache=True).logits
    first = logits[:, -1].argmax(-1)
    more = GraphedDecoder(model, cache, max_new_tokens=256).decode(first, 256)  # [batch, 256]
```

A step is the whole model: embedding, layers, logits, argmax, and the position of the next token. A CUDA graph replays
launches at fixed addresses and runs no Python. All room is therefore allocated first (`nbytes` counts it), the device
counts the tokens seen by itself, and the counts of Python are updated after each replay. The first step runs eagerly, to
compile and allocate; the second is captured. On a CPU, where the decode kernel does not serve (see `captured`), or while
the past is recorded, every step runs eagerly, with the same results. The cache's counts are right after every step, so it
can be used in any other way afterwards.

A `StaticCache` is served too: the full cache under the same capture, for comparison.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache, StaticLayer

from kvcompress.cache.attend import AttendOptions, sees_all
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.errors import CacheUseError, InputError, UnsupportedModelError
from kvcompress.models.tensor_parallel import shard_of

NEVER = 2**31  # a column that no text reaches


def can_record(device: torch.device) -> bool:
    """Return whether launches on a device can be captured."""
    return device.type == "cuda"


def record(act: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture the launches of `act` without running them; calling the result runs them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        act()
    replay: Callable[[], None] = graph.replay
    return replay


class StaticState:
    """Decode loop's view of a filled `StaticCache`, which counts on the device by itself.

    Raises `CacheUseError` for a cache that is empty, was filled in inference mode or has layers with a sliding window.
    """

    pads: Tensor | None = None
    recording = False

    def __init__(self, cache: StaticCache) -> None:
        if any(type(layer) is not StaticLayer for layer in cache.layers):
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise CacheUseError(f"the static cache has layers of {' and '.join(kinds)}; expected StaticLayer alone")
        if not all(layer.is_initialized for layer in cache.layers):
            raise CacheUseError("the static cache holds no tokens yet: run the prompt first")
        if any(layer.keys.is_inference() for layer in cache.layers):
            raise CacheUseError("the static cache was filled in inference mode; expected torch.no_grad()")
        self.cache = cache
        self.batch, self.room = cache.layers[0].keys.shape[0], cache.layers[0].max_cache_len
        self.seen = int(cache.get_seq_length())

    def open(self) -> None:
        """Nothing is due before a step."""

    def passes(self) -> AbstractContextManager[None]:
        return nullcontext()

    def advance(self) -> None:
        self.seen += 1

    count_replay = advance

    def can_be_captured(self) -> bool:
        return True

    def addresses(self) -> list[object]:
        return [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]

    def snapshot(self) -> Callable[[], None]:
        seen = self.seen

        def restore() -> None:
            self.seen = seen

        return restore


class RaggedState:
    """Decode loop's view of a `RaggedCache` with room for `new` more tokens. Raises `CacheUseError` from `reserve`.

    `room` is the number of tokens the cache can hold without moving, None for any number.
    """

    def __init__(self, cache: RaggedCache, new: int, device: torch.device) -> None:
        cache.reserve(cache.seen + new)
        self.cache, self.device, self.batch = cache, device, cache.batch_size
        self.layers, self.fused, self.padding = cache.compressed_layers, cache.shared.fused, cache.shared.padding
        self.groups = [group for layer in self.layers for group in layer.groups]
        self.room = min((group.block.slots for group in self.groups if group.capacity is None), default=None)
        self._stores = 0  # launches before this step that stored their own column

    @property
    def seen(self) -> int:
        return self.cache.seen

    @property
    def pads(self) -> Tensor | None:
        """Pad columns of every row, `[batch]`, None without padding."""
        return self.padding.columns

    @property
    def recording(self) -> bool:
        """True if steps must record what they overwrite. A captured step records nothing."""
        return any(layer.record_past for layer in self.layers)

    def open(self) -> None:
        """Before a step, outside the capture: run due selections and set the device's count."""
        self.cache.select_due()
        self._stores = self.fused.state(self.device, self.seen).stores

    def passes(self) -> AbstractContextManager[None]:
        """Context in which passes without a mask keep the padding."""
        return self.padding.known()

    def advance(self) -> None:
        """Within a step, before the model: count on the device."""
        self.fused.advance(self.device, self.seen)

    def count_replay(self) -> None:
        """After a replay: update the counts of Python."""
        self.fused.advance(self.device, self.seen, on_device=False)
        for layer in self.layers:
            layer.count()

    def can_be_captured(self) -> bool:
        """Return whether one launch served every layer and stored its column, and all later steps will be alike."""
        served = self.fused.state(self.device, self.seen).stores - self._stores
        if served != sum(bool(layer.groups) for layer in self.layers):
            return False
        if not all(group.takes_one_slot(self.padding) for group in self.groups):
            return False
        rotation = self.cache.shared.rotation
        for layer in self.layers:
            options = AttendOptions(self.padding, None, 0.0, layer.sliding_window, rotation)
            if not all(sees_all(group, NEVER, options) for group in layer.groups):
                return False
        # The step in which the last pads leave a ring launches another variant of the kernel.
        longest = self.padding.longest
        return not longest or all(
            group.capacity is None or self.seen + 1 != group.capacity + longest for group in self.groups
        )

    def addresses(self) -> list[object]:
        """Return everything a captured step holds the address of; a replay requires the same objects."""
        tensors = [tensor for layer in self.layers for tensor in layer.tensors]
        return [self.pads, self.fused.state(self.device, self.seen).scratch, *tensors]

    def snapshot(self) -> Callable[[], None]:
        """Return a function that restores the counts of Python."""
        state = self.fused.state(self.device, self.seen)
        written = state.written
        layers = [(layer, layer.seen) for layer in self.layers]
        groups = [(group, group.seen) for group in self.groups]

        def restore() -> None:
            state.written = written
            for layer, seen in layers:
                layer.seen = seen
            for group, seen in groups:
                group.seen = seen

        return restore


class GraphedDecoder:
    """Greedy decode steps of `model` on a cache that holds a prompt, replayed from a CUDA graph.

    Parameters
    ----------
    model : the model, inside `attached` for a compressed cache
    cache : a `RaggedCache`, or a `StaticCache` for comparison; it must hold the prompt
    max_new_tokens : room to allocate, in tokens

    `logits` are those of the last step, `[batch, vocabulary]`; the next step overwrites them. Raises `CacheUseError` for
    a cache that is empty or of another kind, `InputError` for `max_new_tokens` below 1, `UnsupportedModelError` for a
    model on several devices or split among processes.
    """

    def __init__(self, model: PreTrainedModel, cache: RaggedCache | StaticCache, max_new_tokens: int) -> None:
        if shard_of(model.config).count > 1:
            raise UnsupportedModelError("a decode step of a model split among processes cannot be captured")
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1:
            raise UnsupportedModelError(f"the model lies on {len(devices)} devices; a graph can be captured on one")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self.model, self.cache, self.device = model, cache, devices.pop()
        if isinstance(cache, RaggedCache):
            self.past: RaggedState | StaticState = RaggedState(cache, max_new_tokens, self.device)
        elif isinstance(cache, StaticCache):
            self.past = StaticState(cache)
            self._require_room(max_new_tokens, self.past.batch)
        else:
            raise CacheUseError(f"the cache is a {type(cache).__name__}; expected a compressed cache or a StaticCache")
        with torch.inference_mode(False):  # tensors made in inference mode can be written only there
            self._ids, self._positions = torch.zeros(2, self.past.batch, 1, dtype=torch.long, device=self.device)
        self._at: tuple[int, Tensor | None] | None = None  # columns seen and pads that the positions follow from
        self._replay: Callable[[], None] | None = None
        self._captured: list[object] = []  # addresses of the captured step
        self._weights = 0
        self._ready: tuple[int, list[object]] | None = None  # columns seen and addresses after a capturable step
        self.logits: Tensor | None = None

    @property
    def captured(self) -> bool:
        """True once a step has been captured: after the second step, where capture is possible."""
        return self._replay is not None

    def step(self, tokens: Tensor) -> Tensor:
        """Feed the next tokens, `[batch]`, and return the most likely ones after them, `[batch]`.

        Raises `CacheUseError` if the room is used up, the batch size differs or, after the capture, a tensor that the
        step reads has moved; `UnsupportedModelError` if the model cannot be captured.
        """
        return self.decode(tokens, 1)[:, 0]

    @torch.no_grad()
    def decode(self, tokens: Tensor, count: int) -> Tensor:
        """Run `count` steps, each fed with the tokens of the one before, and return them, `[batch, count]`.

        The last of them is not in the cache yet. Decoding does not stop at an end-of-text token.
        """
        self._require_room(count, tokens.numel())
        self._ids.copy_(tokens.reshape(-1, 1))
        found = torch.empty(self.past.batch, count, dtype=torch.long, device=self.device)
        for i in range(count):
            self._step()
            found[:, i].copy_(self._ids[:, 0])
        return found

    def _require_room(self, new: int, batch: int) -> None:
        past = self.past
        if batch != past.batch:
            raise CacheUseError(f"the cache holds a batch of {past.batch}, but got tokens of {batch} rows")
        if past.room is not None and past.seen + new > past.room:
            raise CacheUseError(
                f"the cache has room for {past.room} tokens and saw {past.seen}, so {new} more do not fit: make a new"
                " decoder with more room"
            )

    def _step(self) -> None:
        past = self.past
        if self._at is None or self._at[0] != past.seen or self._at[1] is not past.pads:
            self._positions.fill_(past.seen)
            if past.pads is not None:
                self._positions.sub_(past.pads[:, None])
        past.open()
        if past.recording or not (self._replay or self._is_ready()):
            self._forward()
            if can_record(self.device) and past.can_be_captured():
                self._ready = past.seen, past.addresses()
        elif self._replay is None:
            self._capture()()
        else:
            self._require_unmoved()
            self._replay()
            past.count_replay()
        self._at = past.seen, past.pads

    def _is_ready(self) -> bool:
        """Return whether the cache is unchanged since the last capturable step."""
        if self._ready is None or self._ready[0] != self.past.seen:
            return False
        return _same(self._ready[1], self.past.addresses())

    def _forward(self) -> None:
        self.past.advance()
        with self.past.passes():
            out = self.model(
                self._ids, past_key_values=self.cache, position_ids=self._positions, use_cache=True, return_dict=True
            )
        self.logits = out.logits[:, -1]
        self._ids.copy_(self.logits.argmax(-1, keepdim=True))
        self._positions.add_(1)

    def _capture(self) -> Callable[[], None]:
        """Capture a step. Python has counted it by then; the first replay computes it."""
        restore = self.past.snapshot()
        try:
            self._replay = record(self._forward, self.device)
        except RuntimeError as error:
            restore()
            self._ready = None
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedModelError(
                f"a decode step of {type(self.model).__name__} cannot be captured in a CUDA graph: {error}"
            ) from error
        self._captured = self.past.addresses()  # kept alive, so that no other tensor can take their addresses
        self._weights = self._weights_at()
        return self._replay

    def _weights_at(self) -> int:
        """Return the address of the embedding; all weights move together."""
        at: int = self.model.get_input_embeddings().weight.data_ptr()
        return at

    def _require_unmoved(self) -> None:
        if not _same(self._captured, self.past.addresses()) or self._weights != self._weights_at():
            raise CacheUseError(
                "the cache or the model has moved in memory since a step was captured: make a new decoder for it"
            )


def _same(before: list[object], now: list[object]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
