"""Standard errors of head statistics over documents, and the rule that stops collecting early.

Queries of one document are correlated, so documents are the unit. A statistic is a ratio, the sum of S over documents
divided by the sum of their queries n. With m that ratio and D documents, its squared standard error is

    D / (D - 1) * sum (S - m n)^2 / (sum n)^2

(the linearised variance of a ratio estimate: Cochran, *Sampling Techniques*, 1977, section 6.4). The sum expands into
sums of S^2, S n and n^2, which add over documents and processes.

Classes have bounds in entropy and sink ratio. Once every head is known within a small share of the distance between the
bounds, more text changes the class only of heads that lie on a bound.
"""

import numpy as np

from kvcompress.collect.params import CollectParams
from kvcompress.collect.sums import AttentionSums

FEWEST = 8  # documents; with fewer, a standard error is itself too uncertain to stop by


def standard_errors(sums: AttentionSums) -> tuple[np.ndarray, np.ndarray]:
    """Return standard errors of mean entropy (nats) and of the weight on the first k + 1 keys.

    Shapes: `[layer, head]` and `[layer, head, k]`. Infinite for fewer than two documents.
    """
    data = {name: tensor.numpy() for name, tensor in sums.tensors.items()}
    pairs = ((data["entropy"], "entropy"), (data["sinks"].cumsum(-1), "sinks"))
    entropy, sinks = (ratio_error(sums, total, data[f"{name}_by_document"]) for total, name in pairs)
    return entropy, sinks


def ratio_error(sums: AttentionSums, total: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Return the standard error of `total` `[layer, head, ...]` per query.

    `products` `[layer, head, 2, ...]`: sums of S^2 and S n.
    """
    if sums.documents < 2:
        return np.full(total.shape, np.inf)
    shape = (-1, *[1] * (total.ndim - 1))
    queries = sums.tensors["queries"].numpy().reshape(shape)
    squares = sums.tensors["queries_by_document"].numpy().reshape(shape)
    mean = total / queries
    spread = products[:, :, 0] - 2 * mean * products[:, :, 1] + mean**2 * squares
    unbiased = sums.documents / (sums.documents - 1)
    return np.sqrt(unbiased * spread.clip(0)) / queries


def precise_enough(sums: AttentionSums, params: CollectParams) -> bool:
    """Return True if no head's standard error exceeds `stop_entropy_error` or `stop_sink_error`.

    Bounds that are None are ignored; without any, or before `FEWEST` documents, return False. The sink ratio has to be
    precise for every number of sinks, because that number is chosen later.
    """
    bounds = (params.stop_entropy_error, params.stop_sink_error)
    if sums.documents < FEWEST or bounds == (None, None):
        return False
    errors = standard_errors(sums)
    return all(bound is None or bool(found.max() <= bound) for found, bound in zip(errors, bounds, strict=True))
