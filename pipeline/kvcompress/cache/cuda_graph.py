"""Greedy decoding in which a step costs the host nothing: one step is captured in a CUDA graph and replayed.

```python
with compressor.attached(model):
    cache = compressor.new_cache(model.config)
    logits = model(prompt, past_key_values=cache, use_cache=True).logits
    first = logits[:, -1].argmax(-1)
    more = GraphedDecoder(model, cache, max_new_tokens=256).decode(first, 256)  # [batch, 256]
```

The step is the whole model: embedding, layers, logits, argmax, and the position of the next token. Bounded heads are
rings that stand still anyway; heads without a bound get room for `max_new_tokens` beforehand, which `cache.nbytes`
counts. The first step runs as it is, to compile and allocate; the second is captured. On a CPU, where the cache's kernel
does not serve (`captured` says so), or while the past is recorded, every step runs as it is, with the same results. The
cache's counts are right after every step, so it can go on in any other way afterwards.

A `StaticCache` is served too: the full cache under the same capture, to compare with.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache

from kvcompress.cache.cuda_graph_state import Standing, StandingCache, StandingDense
from kvcompress.cache.ragged_cache import RaggedCache
from kvcompress.core.errors import CacheUseError, InputError, UnsupportedModelError
from kvcompress.models.tensor_parallel import shard_of


def can_record(device: torch.device) -> bool:
    """Whether launches on a device can be captured."""
    return device.type == "cuda"


def record(act: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture what `act` would launch, without doing it; a call of the result does it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        act()
    replay: Callable[[], None] = graph.replay
    return replay


class GraphedDecoder:
    """Decode steps of `model` after a cache that holds a prompt, for at most `max_new_tokens` more tokens.

    `logits` are those of the last step, `[batch, vocabulary]`; the next step overwrites them. Raises `CacheUseError` for
    a cache that is empty or of another kind, `InputError` for a number below 1, `UnsupportedModelError` for a model on
    several devices or split among processes.
    """

    def __init__(self, model: PreTrainedModel, cache: RaggedCache | StaticCache, max_new_tokens: int) -> None:
        if shard_of(model.config).count > 1:
            raise UnsupportedModelError(
                "a step of a model split among processes cannot be captured: they wait for each other"
            )
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1:
            raise UnsupportedModelError(f"the model lies on {len(devices)} devices, a graph can be captured on one")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self.model, self.cache, self.device = model, cache, devices.pop()
        if isinstance(cache, RaggedCache):
            self.past: StandingCache = Standing(cache, max_new_tokens, self.device)
        elif isinstance(cache, StaticCache):
            self.past = StandingDense(cache, max_new_tokens, self.device)
        else:
            raise CacheUseError(f"the cache is a {type(cache).__name__}, expected a compressed cache or a StaticCache")
        with torch.inference_mode(False):  # made in inference mode, they could be written nowhere else
            self._ids, self._positions = torch.zeros(2, self.past.batch, 1, dtype=torch.long, device=self.device)
        self._at: tuple[int, Tensor | None] | None = None  # what the positions were made from
        self._replay: Callable[[], None] | None = None
        self._pieces: list[object] = []
        self._weights = 0
        self._ready: tuple[int, list[object]] | None = None  # after a step that shows what a captured one would be
        self.logits: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether steps are replayed by now: after the second one, where they can be."""
        return self._replay is not None

    def step(self, tokens: Tensor) -> Tensor:
        """Feed the next tokens, `[batch]`, and choose the most likely ones after them, `[batch]`.

        Raises `CacheUseError` where the room is used up, the batch is another one or, once a step is captured, anything
        that it reads has moved; `UnsupportedModelError` where the model does what cannot be captured.
        """
        return self.decode(tokens, 1)[:, 0]

    @torch.no_grad()
    def decode(self, tokens: Tensor, count: int) -> Tensor:
        """As `step`, each step fed with what the one before chose: `count` tokens, `[batch, count]`.

        The last of them is not in the cache yet. Nothing stops at an end-of-text token.
        """
        self.past.require(count, tokens.numel())
        self._ids.copy_(tokens.reshape(-1, 1))
        chosen = torch.empty(self.past.batch, count, dtype=torch.long, device=self.device)
        for i in range(count):
            self._step()
            chosen[:, i].copy_(self._ids[:, 0])
        return chosen

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
                self._ready = past.seen, past.pieces()
        elif self._replay is None:
            self._capture()()
        else:
            self._require_still()
            self._replay()
            past.count()
        self._at = past.seen, past.pads

    def _is_ready(self) -> bool:
        """Whether nothing has happened to the cache since a step after which the next can be captured."""
        if self._ready is None or self._ready[0] != self.past.seen:
            return False
        return _same(self._ready[1], self.past.pieces())

    def _forward(self) -> None:
        self.past.advance()
        with self.past.reading():
            out = self.model(
                self._ids, past_key_values=self.cache, position_ids=self._positions, use_cache=True, return_dict=True
            )
        self.logits = out.logits[:, -1]
        self._ids.copy_(self.logits.argmax(-1, keepdim=True))
        self._positions.add_(1)

    def _capture(self) -> Callable[[], None]:
        """Capture a step; Python has then counted it, and the first replay does it."""
        back = self.past.undo()
        try:
            self._replay = record(self._forward, self.device)
        except RuntimeError as error:
            back()
            self._ready = None
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedModelError(
                f"a decode step of {type(self.model).__name__} cannot be captured in a CUDA graph: {error}"
            ) from error
        self._pieces = self.past.pieces()  # held, so that no other tensor can come to lie at their addresses
        self._weights = self._weights_at()
        return self._replay

    def _weights_at(self) -> int:
        """Where the weights lie: they move together."""
        at: int = self.model.get_input_embeddings().weight.data_ptr()
        return at

    def _require_still(self) -> None:
        if not _same(self._pieces, self.past.pieces()) or self._weights != self._weights_at():
            raise CacheUseError(
                "the cache or the model has moved in memory since a step was captured: make a new decoder for it"
            )


def _same(before: list[object], now: list[object]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
