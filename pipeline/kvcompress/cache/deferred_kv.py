"""What a compressed cache hands to the attention: a note, not a tensor.

A layer of a compressed cache has no one tensor of keys that a dense attention could read, so `update` returns the new
keys and values wrapped in a `Pending` that knows its layer. The attention of this package unwraps it. Any other
attention (`sdpa`, `eager`, flash) stumbles over it at its first touch and gets a `CacheUseError`, never a wrong answer;
and because nothing is stored before the attention has read the note, the cache is then as it was.
"""

from typing import TYPE_CHECKING, Any, NoReturn

from kvcompress.core.errors import CacheUseError

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.cache.layer import CompressedLayer


def _refuse() -> NoReturn:
    raise CacheUseError(
        "a compressed cache was given to a model whose attention cannot read it: run the model inside"
        " `with compressor.attached(model):` and leave its attn_implementation alone there"
    )


class Pending:
    """New keys and values of one layer, `[batch, kv_head, query, head_dim]` each, on their way to its attention."""

    __slots__ = ("keys", "layer", "values")

    def __init__(self, layer: "CompressedLayer", keys: "Tensor", values: "Tensor") -> None:
        self.layer, self.keys, self.values = layer, keys, values

    def __getattr__(self, name: str) -> NoReturn:
        _refuse()

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse()
