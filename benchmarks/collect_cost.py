"""What observing attention costs: time as a multiple of a plain forward pass, and peak memory beyond it.

Run: python -m benchmarks.collect_cost data/model

Time: three ways over the same tokens alternate in one process: the decoder (without its output layer) with SDPA, whole;
the same in chunks with a KV cache; and observed, in the same chunks. The ratios are of medians, observed to each of the
plain ones. Memory: each way in a fresh process, its peak beyond the loaded model.
"""

import json
import multiprocessing
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from kvcompress.collect.collect import collect_attention
from kvcompress.core.artifacts import write_json
from kvcompress.evaluation.timing import devices_of, timed
from kvcompress.models.load import input_device, load_folder
from kvcompress.models.params import LocalModel, ModelParams


def load(folder: str, device: str, dtype: str) -> PreTrainedModel:
    params = ModelParams.model_validate(
        {"source": "local", "local": LocalModel(path=folder), "device": device, "dtype": dtype}
    )
    return load_folder(folder, params)[0]


def random_tokens(model: PreTrainedModel, length: int) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))


WAYS = ("plain", "chunked", "observed")


def forward(model: PreTrainedModel, tokens: torch.Tensor, way: str, chunk_size: int) -> None:
    """One pass over `tokens`: plain (whole), chunked (plain, with a KV cache) or observed in the same chunks."""
    if way == "observed":
        collect_attention(model, [tokens], chunk_size, progress=False)
        return
    cache = DynamicCache() if way == "chunked" else None
    size = chunk_size if way == "chunked" else len(tokens)
    with torch.inference_mode():
        for chunk in tokens.to(input_device(model)).split(size):
            model.base_model(chunk[None], past_key_values=cache, use_cache=cache is not None)


def seconds(model: PreTrainedModel, tokens: torch.Tensor, way: str, chunk_size: int) -> float:
    return timed(partial(forward, model, tokens, way, chunk_size), devices_of(model))[1] / 1000


def peak_bytes(folder: str, device: str, dtype: str, length: int, way: str, chunk_size: int) -> int:
    """Peak memory of a pass beyond the loaded model: of the CUDA allocator, or of this (fresh) process."""
    model = load(folder, device, dtype)
    forward(model, random_tokens(model, 64), way, chunk_size)  # one-time costs of the libraries
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward(model, random_tokens(model, length), way, chunk_size)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident set (Linux)
    before = resident("VmRSS")
    forward(model, random_tokens(model, length), way, chunk_size)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A memory figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_fresh_process(*arguments: object) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_bytes, arguments)


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a model in safetensors.")],
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "2048,4096,8192",
    chunk_size: Annotated[int, typer.Option(help="Tokens fed at a time.")] = 512,
    repeats: Annotated[int, typer.Option(help="Timed pairs for each length.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    output: Annotated[Path | None, typer.Option(help="Also write the results as JSON.")] = None,
) -> None:
    """Time and memory of collecting attention against a plain forward pass over the same tokens."""
    loaded = load(str(model), device, dtype)
    name = torch.cuda.get_device_name() if loaded.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = []
    for length in map(int, lengths.split(",")):
        tokens = random_tokens(loaded, length)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for way in WAYS:
            seconds(loaded, tokens[:64], way, chunk_size)
        for _ in range(repeats):
            for way in WAYS:
                times[way].append(seconds(loaded, tokens, way, chunk_size))
        median = {way: statistics.median(values) for way, values in times.items()}
        memory = {way: in_fresh_process(str(model), device, dtype, length, way, chunk_size) / 1e6 for way in WAYS}
        row: dict[str, float] = {"tokens": length} | {f"{way}_s": round(median[way], 3) for way in WAYS}
        row |= {f"to_{way}": round(median["observed"] / median[way], 3) for way in WAYS[:2]}
        rows.append(row | {f"{way}_mb": round(memory[way]) for way in WAYS})
    table = Table(title=f"collecting attention, {dtype}, chunks of {chunk_size}, {name}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if output:
        versions = {"torch": torch.__version__, "device": name, "dtype": dtype, "chunk_size": chunk_size}
        write_json(output, {**versions, "repeats": repeats, "rows": rows})
    else:
        print(json.dumps(rows))


if __name__ == "__main__":
    typer.run(main)
