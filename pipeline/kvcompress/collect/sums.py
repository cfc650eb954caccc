"""Attention sums: sums over queries from which every head statistic follows without the model.

There is one set for each layer and query head, summed over all scored queries of all documents. They add over documents
and processes, so another sink size, local window, recent ratio or threshold needs no forward pass, and no size grows
with the text. Blocks are added in float64. `q` is a query's position, `k` a key's, `d = q - k` their distance, `n` the
number of keys visible to the query (q + 1, or less under a sliding window).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.core.artifacts import read_tensors, write_tensors
from kvcompress.core.errors import InputError

SINK_POSITIONS = 64  # first keys whose weights are kept singly; upper bound of statistics.sink_size
EARLY_QUERIES = 128  # first queries kept singly: there, sinks and a local window of up to 64 keys overlap
DISTANCES = 1024  # distances kept singly; the rest is the tail
RECENT_STEPS = 100  # recent_ratio in steps of one percent

# Sums of each head: name -> trailing shape of the tensor [layer, head, ...].
HEAD_SUMS: dict[str, tuple[int, ...]] = {
    "entropy": (),  # -sum p log p, nats
    "entropy_squared": (),
    "normalized_entropy": (),  # entropy / log n over queries with n > 1, in [0, 1]
    "max_weight": (),
    "sinks": (SINK_POSITIONS,),  # weight on key k
    "early": (EARLY_QUERIES, SINK_POSITIONS),  # weight of query q on key k
    "relative": (DISTANCES,),  # weight at distance d
    "relative_tail": (),  # weight at distances of DISTANCES and more
    "relative_sinks": (DISTANCES,),  # weight at distance d on the first SINK_POSITIONS keys, contained in `relative`
    "recent": (RECENT_STEPS,),  # [b]: weight on the last max(1, floor((b + 1) n / 100)) keys
    # For standard errors, from each document's sum S over its n queries: S squared, and S times n.
    "entropy_by_document": (2,),
    "sinks_by_document": (2, SINK_POSITIONS),  # S: weight on the first k + 1 keys
    "induction": (),  # induction scores (kvcompress.collect.induction), added up over probes
}
# Counts of each layer: name -> trailing shape of the tensor [layer, ...].
LAYER_COUNTS: dict[str, tuple[int, ...]] = {
    "queries": (),
    "varied_queries": (),  # queries with n > 1
    "log_visible": (),  # sum of log n, nats: the entropy of a uniform head
    "queries_by_document": (),  # n squared
    "probes": (),  # runs that measured the induction score
}


class AttentionSums:
    """Sums of one model.

    tensors: `tensors[name]` is `[layer, head, ...]` for sums of heads, `[layer, ...]` for counts.
    documents: number of documents observed.
    longest: length of the longest document (tokens).
    """

    def __init__(self, tensors: dict[str, Tensor], documents: int, longest: int) -> None:
        self.tensors = tensors
        self.documents = documents
        self.longest = longest

    @property
    def num_layers(self) -> int:
        return self.tensors["entropy"].shape[0]

    @property
    def num_heads(self) -> int:
        return self.tensors["entropy"].shape[1]

    def __add__(self, other: "AttentionSums") -> "AttentionSums":
        """Add the sums of two sets of documents. Raises `InputError` if layers or heads differ in number."""
        mine, theirs = self.tensors["entropy"].shape, other.tensors["entropy"].shape
        if mine != theirs:
            raise InputError(f"attention sums of {tuple(mine)} and {tuple(theirs)} (layers, heads) cannot be added")
        tensors = {name: tensor + other.tensors[name] for name, tensor in self.tensors.items()}
        return AttentionSums(tensors, self.documents + other.documents, max(self.longest, other.longest))

    @classmethod
    def none(cls, layers: int, heads: int) -> "AttentionSums":
        """Return the sums of no document."""
        layer = empty_layer(heads, torch.device("cpu"))
        return cls({name: torch.stack([tensor] * layers) for name, tensor in layer.items()}, documents=0, longest=0)

    @classmethod
    def stack(cls, layers: list[dict[str, Tensor]], tokens: int) -> "AttentionSums":
        """Stack the sums of one document's layers, each a dict as of `empty_layer`."""
        tensors = {name: torch.stack([layer[name].cpu() for layer in layers]) for name in layers[0]}
        queries = tensors["queries"][:, None]
        for name, total in (("entropy", tensors["entropy"]), ("sinks", tensors["sinks"].cumsum(-1))):
            count = queries.view(-1, *[1] * (total.dim() - 1))
            tensors[f"{name}_by_document"] = torch.stack([total.square(), total * count], dim=2)
        tensors["queries_by_document"] = tensors["queries"].square()
        return cls(tensors, documents=1, longest=tokens)

    def save(self, path: str | Path, header: Mapping[str, Any]) -> None:
        """Write a safetensors file; `header` names the model and text of the sums."""
        write_tensors(path, self.tensors, {**header, "documents": self.documents, "longest": self.longest})

    @classmethod
    def load(cls, path: str | Path) -> tuple["AttentionSums", dict[str, Any]]:
        """Read (sums, header). Raises `InputError` if the file is incomplete or has values that are not finite."""
        tensors, header = read_tensors(path)
        shapes = {**HEAD_SUMS, **LAYER_COUNTS}
        if set(tensors) != set(shapes):
            odd = sorted(set(tensors) ^ set(shapes))
            raise InputError(f"{path} lacks the sums of this version: {', '.join(odd)} differ; collect again")
        for name, tensor in tensors.items():
            lead = tensors["entropy"].shape[: 1 if name in LAYER_COUNTS else 2]
            if tensor.shape != (*lead, *shapes[name]):
                raise InputError(
                    f"{path}: {name} has the shape {tuple(tensor.shape)}, expected {(*lead, *shapes[name])}"
                )
            if not tensor.isfinite().all():
                raise InputError(f"{path}: {name} holds values that are not finite numbers")
        for name in ("documents", "longest", "model_id", "revision", "num_key_value_heads"):
            if name not in header:
                raise InputError(f"{path}: its header has no {name!r}; collect again")
        return cls(tensors, int(header["documents"]), int(header["longest"])), header


def empty_layer(heads: int, device: torch.device) -> dict[str, Tensor]:
    """Return zeros for one layer's sums on `device`, float64."""
    sums = {name: torch.zeros(heads, *shape, dtype=torch.float64, device=device) for name, shape in HEAD_SUMS.items()}
    counts = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in LAYER_COUNTS.items()}
    return sums | counts


def count_queries(sums: dict[str, Tensor], visible: Tensor) -> None:
    """Count a block of queries, in place; each sees `visible` keys, `[query]`."""
    sums["queries"] += len(visible)
    sums["varied_queries"] += (visible > 1).sum()
    sums["log_visible"] += visible.double().log().sum()


def add_heads(sums: dict[str, Tensor], log_weights: Tensor, weights: Tensor, first: int, visible: Tensor) -> None:
    """Add a block of queries to the sums of some heads, in place.

    `weights` `[head, query, key]` float32, contiguous: attention of the queries at positions `first`, `first + 1` ...
    to the keys at positions 0 ... `first + queries - 1`, zero where a key is not visible; `log_weights` is its
    logarithm, finite everywhere. Each query sees `visible` keys, `[query]`, its own among them.
    """
    _, queries, keys = weights.shape
    position = torch.arange(first, first + queries, device=weights.device)
    log_visible = visible.double().log()

    entropy = -torch.linalg.vecdot(weights, log_weights).double()  # [head, query]
    sums["entropy"] += entropy.sum(1)
    sums["entropy_squared"] += entropy.square().sum(1)
    varied = visible > 1  # the entropy over a single key is 0, whatever the divisor
    sums["normalized_entropy"] += (entropy / torch.where(varied, log_visible, 1.0)).sum(1)
    sums["max_weight"] += weights.amax(-1).double().sum(1)

    width = min(SINK_POSITIONS, keys)
    sums["sinks"][:, :width] += weights[..., :width].double().sum(1)
    if first < EARLY_QUERIES:
        rows = min(queries, EARLY_QUERIES - first)
        sums["early"][:, first : first + rows, :width] += weights[:, :rows, :width].double()

    by_distance = sum_by_distance(weights, first, DISTANCES)
    sums["relative"] += by_distance
    sums["relative_tail"] += queries - by_distance.sum(1)
    if first < DISTANCES + SINK_POSITIONS:  # later queries are farther than DISTANCES from every sink
        sums["relative_sinks"] += sum_by_distance(weights[..., :width].contiguous(), first, DISTANCES)
    sums["recent"] += sum_recent(weights, position, visible)


def sum_by_distance(weights: Tensor, first: int, distances: int) -> Tensor:
    """Sum `weights` `[head, query, key]` along the diagonals: result `[head, distance]`, float64.

    Query i is at position `first + i`, key j at position j; distance is query minus key. Diagonals become columns of a
    strided view (one step in queries is one step in keys), so no element is copied once the block is far enough from
    the start; near the start, the block is padded with zero keys at negative positions.
    """
    heads, queries, keys = weights.shape
    reach = min(distances, first + queries)  # distances that occur
    lowest = first - (reach - 1)  # key position of query 0 at distance reach - 1, negative near the start
    highest = first + queries  # one past the key position of the last query at distance 0
    left, right = max(-lowest, 0), max(highest - keys, 0)
    if left or right:
        weights = torch.nn.functional.pad(weights, (left, right))
    row = weights.shape[2]
    view = weights.as_strided(
        (heads, queries, reach), (queries * row, row + 1, 1), weights.storage_offset() + lowest + left
    )
    result = torch.zeros(heads, distances, dtype=torch.float64, device=weights.device)
    result[:, :reach] = view.sum(1).flip(-1)
    return result


def sum_recent(weights: Tensor, position: Tensor, visible: Tensor) -> Tensor:
    """Sum the weight on the most recent keys, for each percent of the visible ones: `[head, RECENT_STEPS]`, float64."""
    percent = torch.arange(1, RECENT_STEPS + 1, device=weights.device)
    count = (visible[:, None] * percent // RECENT_STEPS).clamp(min=1)  # [query, step]
    before = position[:, None] - count  # the last key that is not recent; -1: all are
    cumulated = weights.cumsum(-1)  # [head, query, key]
    index = before.clamp(min=0).expand(weights.shape[0], -1, -1)
    not_recent = cumulated.gather(-1, index).masked_fill(before < 0, 0)
    return (cumulated[..., -1:] - not_recent).double().sum(1)
