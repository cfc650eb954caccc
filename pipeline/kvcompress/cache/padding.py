"""Left padding of a batch: how many columns of each row come before its first real token.

Sinks are a row's first *real* tokens and positions count real tokens, so a compressed cache must know its padding.
transformers tells it to nobody but the function that builds the attention mask, and that function is told nothing of
the cache except the lengths the cache reports. So the cache reports a length that carries its `Padding` along
(`MaskLength`), and the mask function writes down there what it was given.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvcompress.core.errors import CacheUseError


class Padding:
    """Pad columns of every row of one cache; `columns` is `[batch]`, or None while no row has any."""

    def __init__(self) -> None:
        self.columns: Tensor | None = None
        self.longest = 0
        self._known = False

    @contextmanager
    def known(self) -> Iterator[None]:
        """Here a pass without a mask goes on with the padding noted before: new columns are real tokens in all rows."""
        self._known = True
        try:
            yield
        finally:
            self._known = False

    def note(self, mask: Tensor | None, seen: int, new: int) -> None:
        """Take the 2-D attention mask of a forward pass, bool `[batch, seen + new]`, True at real tokens.

        Raises `CacheUseError` for right padding, holes, a mask of another length, or one that contradicts an earlier
        one: each of them would shift positions or make a pad token a sink.
        """
        if mask is None:
            if self.columns is not None and not self._known:
                raise CacheUseError(
                    "this cache was filled with left padding and now got no attention_mask, expected one over all"
                    f" {seen + new} columns"
                )
            return
        mask = mask.bool()
        if mask.shape[-1] != seen + new:
            raise CacheUseError(
                f"the attention_mask has {mask.shape[-1]} columns, expected {seen} seen + {new} new ones"
            )
        if self.columns is None and bool(mask.all()):
            return
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise CacheUseError("the attention_mask has a 0 after a 1: only left padding can be compressed, pad left")
        pads = (~mask).sum(-1)
        before = torch.zeros_like(pads) if self.columns is None else self.columns.to(pads.device)
        # A row that has not begun yet (nothing but padding so far) may go on with padding; the others are settled.
        if seen and bool((pads == before).all()):
            return  # the same tensor stays: a captured step may read it
        if seen and bool(torch.where(before == seen, pads < seen, pads != before).any()):
            raise CacheUseError("the attention_mask disagrees with the padding that this cache was filled with")
        self.set(pads)

    def set(self, columns: Tensor | None) -> None:
        """Replace the pad columns, `[batch]`; all zero is the same as None."""
        self.longest = 0 if columns is None else int(columns.max())
        self.columns = columns if self.longest else None

    def on(self, device: torch.device) -> Tensor | None:
        """The pad columns as `[batch, 1]` on a device, None where there are none."""
        return None if self.columns is None else self.columns.to(device)[:, None]


class MaskLength(int):
    """A key length for the mask function that carries the padding record of the cache that reported it."""

    padding: Padding

    def __new__(cls, value: int, padding: Padding) -> "MaskLength":
        self = super().__new__(cls, value)
        self.padding = padding
        return self
