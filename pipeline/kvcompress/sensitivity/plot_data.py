"""Prices as the report page and `dvc plots` read them: one row a KV head."""

from typing import Any

import numpy as np

from kvcompress.sensitivity.prices import Sensitivity

NEAR = 128  # the window at which prices of heads are compared


def near_window(sensitivity: Sensitivity) -> int:
    """Which of the measured windows is the first of at least NEAR keys, or the last."""
    return int(np.searchsorted(sensitivity.windows, min(NEAR, sensitivity.windows[-1])))


def price_rows(sensitivity: Sensitivity) -> list[dict[str, Any]]:
    """In order of layer and KV head: what `sinks` + `window` keys cost on text (`price`, 1/1000 nat a token), and what
    the head carries of the answer to a question about a far fact (`facts`, nats a token).
    """
    near = near_window(sensitivity)
    price, facts = sensitivity.prices()[near] * 1000, sensitivity.retrieval.mean(0)
    kept = {"sinks": sensitivity.sinks, "window": sensitivity.windows[near]}
    return [
        {"layer": i, "kv_head": j, "price": round(float(price[i, j]), 4), "facts": round(float(facts[i, j]), 4)} | kept
        for i in range(sensitivity.layers)
        for j in range(sensitivity.kv_heads)
    ]
