"""How much memory attention takes to observe in long documents: the peak beyond model and KV cache, which should not grow.

Run: python -m kvcompress.evaluation.long_cost

A tiny random model reads one document of each length in a process of its own. Its exact attention needs all keys, so the KV
cache grows with the text as in any forward pass; what observing adds should not. Measures memory, not time.
"""

import json
import multiprocessing
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompress.analysis.collect import collect_attention
from kvcompress.artifacts import write_json
from kvcompress.evaluation.collect_cost import resident

HEAD_DIM, BYTES = 8, 4


def peak_bytes(length: int, chunk_size: int, heads: int) -> tuple[int, int]:
    """(peak beyond the loaded model, size of the KV cache) of this process, in bytes, for a document of `length` tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=HEAD_DIM * heads, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=1, head_dim=HEAD_DIM, max_position_embeddings=length,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(256, (length,), generator=torch.Generator().manual_seed(0))
    collect_attention(model, [tokens[:64]], chunk_size, progress=False)  # one-time costs of the libraries
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident set (Linux)
    before = resident("VmRSS")
    collect_attention(model, [tokens], chunk_size, progress=False)
    return resident("VmHWM") - before, 2 * BYTES * HEAD_DIM * length


def main(
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "8192,32768,131072",
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens fed at a time.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="Query heads, which share one KV head.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Also write the results as JSON.")] = None,
) -> None:
    """Peak memory of observing one document of each length."""
    rows = []
    for length in map(int, lengths.split(",")):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, cache = pool.apply(peak_bytes, (length, chunk_size, heads))
        row = {
            "tokens": length,
            "kv_cache_mb": cache / 1e6,
            "peak_mb": peak / 1e6,
            "beyond_cache_mb": (peak - cache) / 1e6,
        }
        rows.append({name: round(value, 1) if name != "tokens" else value for name, value in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    table = Table(title=f"observing one document, chunks of {chunk_size}, {heads} query heads, CPU")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if output:
        about = {"torch": torch.__version__, "chunk_size": chunk_size, "query_heads": heads, "rows": rows}
        write_json(output, about)


if __name__ == "__main__":
    typer.run(main)
