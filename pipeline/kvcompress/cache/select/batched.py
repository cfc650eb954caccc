"""Choices of several layers at once.

A choice is a hundred small operations, however few heads make it, and heads with the same slots and the same score are due
at the same time. Before a pass their keys are laid side by side, are judged as those of one large group, and each group
moves its own rows. A score looks at one KV head at a time, so this changes no choice.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace

from kvcompress.cache.layer import CompressedLayer
from kvcompress.cache.select.head_group import ChoosingGroup
from kvcompress.cache.select.types import Evidence, join, join_known

LARGEST = 2**26  # bytes of K and V that are laid side by side, unless a single group has more


def choose_due(layers: Sequence[CompressedLayer]) -> None:
    """Let the groups of these layers choose whose time has come."""
    due: dict[Hashable, list[tuple[ChoosingGroup, Evidence]]] = {}
    for layer in layers:
        for group, evidence in layer.due():
            due.setdefault(group.likeness(evidence), []).append((group, evidence))
    for members in due.values():
        step = max(1, LARGEST // max(group.nbytes for group, _ in members))
        for begin in range(0, len(members), step):
            together = members[begin : begin + step]
            choose([group for group, _ in together], [evidence for _, evidence in together])


def choose(groups: Sequence[ChoosingGroup], evidence: Sequence[Evidence]) -> None:
    """Let groups of the same likeness choose anew, all of their slots being in use."""
    queries = [of.queries for of in evidence if of.queries is not None]
    joined = replace(evidence[0], queries=join(queries) if queries else None)
    keys, values = (join(tensors) for tensors in zip(*(group.read() for group in groups), strict=True))
    exchange = groups[0].weigh(keys, values, joined, join_known([group.known for group in groups]))
    for group, part in zip(groups, exchange.split([len(group.heads) for group in groups]), strict=True):
        group.settle(part)
