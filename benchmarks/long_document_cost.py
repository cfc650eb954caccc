"""Memory that observing one long document takes: flat, but for the keys and values that attention has to keep.

Run: python -m benchmarks.long_document_cost

A tiny random model reads documents of growing length in chunks, each in a fresh process. Reported are the keys and values
that the cache holds at the end, and what the peak of that process, beyond the loaded model, has beside them: no byte is in
both. The copy that a cache makes of its keys, then of its values, as it grows is beside them. Freed memory goes back to the
system at once, so that the peak is of what is in use.
"""

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.collect_cost import random_tokens, resident
from kvcompress.collect.collect import collect_attention
from kvcompress.core.artifacts import write_json

HEADS, HEAD_DIM, BYTES = 1, 8, 4


def observed(length: int, chunk_size: int) -> tuple[int, float]:
    """(peak bytes beyond the model, seconds) of one document, in this process, which must be fresh (Linux)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=HEADS * HEAD_DIM, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=length,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    collect_attention(model, [random_tokens(model, min(length, 2048))], chunk_size, progress=False)  # one-time costs
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident set
    before, start = resident("VmRSS"), time.perf_counter()
    collect_attention(model, [random_tokens(model, length)], chunk_size, progress=False)
    return resident("VmHWM") - before, time.perf_counter() - start


def main(
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "8192,32768,131072",
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens fed at a time.")] = 512,
    output: Annotated[Path | None, typer.Option(help="Also write the results as JSON.")] = None,
) -> None:
    """Peak memory of collecting attention from documents of growing length."""
    rows = []
    os.environ["MALLOC_MMAP_THRESHOLD_"] = (
        "65536"  # of the fresh processes; left to itself it grows, and freed blocks stay
    )
    for length in map(int, lengths.split(",")):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, seconds = pool.apply(observed, (length, chunk_size))
        cache = 2 * HEADS * HEAD_DIM * BYTES * length  # K and V
        sizes = {"cache_mb": round(cache / 1e6, 1), "beside_cache_mb": round((peak - cache) / 1e6, 1)}
        rows.append({"tokens": length, **sizes, "seconds": round(seconds, 1)})
    table = Table(title=f"one layer, heads: {HEADS} x {HEAD_DIM}, chunks of {chunk_size}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for one in rows:
        table.add_row(*map(str, one.values()))
    Console().print(table)
    if output:
        about = {"layers": 1, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "chunk_size": chunk_size}
        write_json(output, {**about, "torch": torch.__version__, "rows": rows})
    else:
        print(json.dumps(rows))


if __name__ == "__main__":
    typer.run(main)
