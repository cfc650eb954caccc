"""Left padding of a batch: the number of pad columns before each row's first real token.

Sinks are a row's first *real* tokens and positions count real tokens, so a compressed cache must know its padding.
transformers passes the attention mask only to the function that builds the 4-D mask, and that function learns nothing of
the cache but the lengths it reports. The cache therefore reports a length that carries its `Padding` (`MaskLength`), and
the mask function records the mask there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvcompress.core.errors import CacheUseError


class Padding:
    """Pad columns of every row of one cache.

    `columns` is an integer tensor `[batch]`, or None if no row is padded; `rows` holds the same numbers as a list, and
    `longest` their maximum.
    """

    def __init__(self) -> None:
        self.columns: Tensor | None = None
        self.rows: list[int] = []
        self.longest = 0
        self._known = False

    @contextmanager
    def known(self) -> Iterator[None]:
        """Accept passes without a mask in this context: the padding stays, and new columns are real tokens."""
        self._known = True
        try:
            yield
        finally:
            self._known = False

    def note(self, mask: Tensor | None, seen: int, new: int) -> None:
        """Record the 2-D attention mask of a forward pass, bool `[batch, seen + new]`, True at real tokens.

        Raises `CacheUseError` for right padding, holes, a mask of another length, or one that contradicts an earlier
        mask. Each of these would shift positions or turn a pad token into a sink.
        """
        if mask is None:
            if self.columns is not None and not self._known:
                raise CacheUseError(
                    "this cache was filled with left padding, but the pass has no attention_mask; expected one over all"
                    f" {seen + new} columns"
                )
            return
        mask = mask.bool()
        if mask.shape[-1] != seen + new:
            raise CacheUseError(f"attention_mask has {mask.shape[-1]} columns; expected {seen} seen + {new} new")
        if self.columns is None and bool(mask.all()):
            return
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise CacheUseError("attention_mask has a 0 after a 1; only left padding can be compressed")
        pads = (~mask).sum(-1)
        before = torch.zeros_like(pads) if self.columns is None else self.columns.to(pads.device)
        if seen and bool((pads == before).all()):
            return  # keeps the same tensor, which a captured step may read
        # A row that has been all padding so far may get more padding; the padding of the others is final.
        if seen and bool(torch.where(before == seen, pads < seen, pads != before).any()):
            raise CacheUseError("attention_mask disagrees with the padding that this cache was filled with")
        self.set(pads)

    def set(self, columns: Tensor | None) -> None:
        """Replace the pad columns, `[batch]`; all zeros mean no padding."""
        rows: list[int] = [] if columns is None else columns.tolist()
        self.longest = max(rows, default=0)
        self.columns, self.rows = (columns, rows) if self.longest else (None, [])

    def on(self, device: torch.device) -> Tensor | None:
        """Return the pad columns as `[batch, 1]` on a device, or None without padding."""
        return None if self.columns is None else self.columns.to(device)[:, None]


class MaskLength(int):
    """Key length for the mask function, carrying the padding record of the cache that reported it."""

    padding: Padding

    def __new__(cls, value: int, padding: Padding) -> "MaskLength":
        self = super().__new__(cls, value)
        self.padding = padding
        return self
