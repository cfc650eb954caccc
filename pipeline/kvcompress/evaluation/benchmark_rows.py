"""One row an entrant: medians with percentiles, quality, and ratios to the full cache of the same run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvcompress.evaluation.benchmark import Record
from kvcompress.evaluation.benchmark_methods import Entrant
from kvcompress.evaluation.benchmark_params import FULL
from kvcompress.evaluation.intervals import BLOCK, paired_difference
from kvcompress.evaluation.timing import Spread, times_faster

NOTHING_TO_COMPRESS = "keeps everything"
CHOOSES_ON_READING = "chooses by the prompt's queries while it reads: see prefill"
FEWEST_BLOCKS = 8  # of neighbouring tokens; a bootstrap over fewer knows nothing of how they vary
NO_DEVICE_MEMORY = "on a CPU methods cannot be told apart: see process_peak_bytes"


def spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in Spread.of(values)._asdict().items()}


def nll_change(nll: np.ndarray, full: np.ndarray) -> dict[str, float | None]:
    """Mean of `nll - full`, both `[sample, token]`, with its interval where there are tokens enough for one."""
    if len(nll) * (nll.shape[1] // BLOCK) < FEWEST_BLOCKS:
        return {"mean": round(float((nll - full).mean()), 5), "low": None, "high": None}
    return {name: round(value, 5) for name, value in paired_difference(nll, full)._asdict().items()}


def benchmark_rows(entrants: Sequence[Entrant], records: Mapping[str, Record], weights: int) -> list[dict[str, Any]]:
    """One row an entrant, in their order.

    `weights`: bytes of the model, counted in `peak_device_bytes`. Where a number cannot be
    had it is None, and `notes` says why. In `to_full`: how much faster (median of the ratios, step by step), the share of
    mean bytes, the ratio of perplexities, and the difference of NLL in nats a token with its bootstrap interval.
    """
    full = records[FULL]
    full_nll = np.array(full.nll)
    rows = []
    for entrant in entrants:
        record = records[entrant.name]
        nll = np.array(record.nll)
        change = nll_change(nll, full_nll)
        step = Spread.of(record.step_ms).median
        notes = {}
        if change["low"] is None:
            notes["nll"] = f"{nll.size} tokens are too few for an interval"
        if not record.compress_ms:
            notes["compress_ms"] = CHOOSES_ON_READING if entrant.compressor else NOTHING_TO_COMPRESS
        if record.peak_device is None:
            notes["peak_device_bytes"] = NO_DEVICE_MEMORY
        row: dict[str, Any] = {
            "name": entrant.name,
            "method": entrant.method,
            "settings": entrant.settings,
            "prefill_tokens_per_s": round(1000 * record.prompt / Spread.of(record.prefill_ms).median, 2),
            "first_token_ms": spread(record.first_token_ms),
            "decode_tokens_per_s": round(1000 / step, 2),
            "decode_ms": spread(record.step_ms),
            "compress_ms": spread(record.compress_ms) if record.compress_ms else None,
            "bytes_mean": round(float(np.mean(record.held))),
            "bytes_peak": record.peak_held,
            "peak_device_bytes": None if record.peak_device is None else weights + record.peak_device,
            "tokens": nll.size,
            "perplexity": round(float(np.exp(nll.mean())), 4),
            "accuracy": round(float(np.mean(record.correct)), 4),
            "to_full": {
                "decode_times_faster": round(times_faster(full.step_ms, record.step_ms), 4),
                "first_token_times_faster": round(times_faster(full.first_token_ms, record.first_token_ms), 4),
                "bytes_share": round(float(np.mean(record.held) / np.mean(full.held)), 4),
                "perplexity_ratio": round(float(np.exp((nll - full_nll).mean())), 4),
                "nll": change,
            },
        }
        rows.append({**row, "notes": notes} if notes else row)
    return rows


def metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The few numbers an entrant that `dvc metrics` compares."""
    return {
        row["name"]: {
            "first_token_ms": row["first_token_ms"]["median"],
            "decode_ms": row["decode_ms"]["median"],
            "perplexity": row["perplexity"],
            "accuracy": row["accuracy"],
            **{name: value for name, value in row["to_full"].items() if name != "nll"},
        }
        for row in rows
    }
