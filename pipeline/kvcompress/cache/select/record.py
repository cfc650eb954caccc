"""Record of what the heads of a layer chose, and when."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """What the heads `heads` of one layer chose when `column` columns had been seen; positions are real ones.

    chosen: `[batch, head, k]`. leaving: `[batch, head, r]`, -1 where nothing of its own; the i-th is overwritten by, and
    so not seen from, column `column + i`. Empty slots of a padded row, not yet reached, are named in `chosen` already.
    """

    column: int
    heads: tuple[int, ...]
    chosen: Tensor
    leaving: Tensor


Choices = list[list[Choice]]  # [layer], in order of time


def of_head(choices: list[Choice], head: int) -> list[tuple[int, Tensor, Tensor]]:
    """(column, chosen `[batch, k]`, leaving `[batch, r]`) of every choice of one KV head, in order of time."""
    return [
        (choice.column, choice.chosen[:, choice.heads.index(head)], choice.leaving[:, choice.heads.index(head)])
        for choice in choices
        if head in choice.heads
    ]
