"""What reading a long prompt costs on a GPU: with the full cache, in an exact prefill, and in a streaming one.

    python -m benchmarks.prefill_cost --output prefill_cost.json
    python -m benchmarks.prefill_cost --tiny --device cpu

Llama-3-8B with random weights, one row. `dense` is a `DynamicCache` read by SDPA; `exact` attends to the whole prompt
and then forgets; `streaming` lets every head see only what it keeps, in one pass or in chunks, whose memory is bounded.
A pass costs the host the more the shorter it is, so dense prompts come in chunks as well. Contenders take turns. Memory is
the peak above the weights, the cache at the end among it.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.step_models import config_of, random_model
from benchmarks.step_parts import forget
from kvcompress.cache.dispatch import attached
from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.evaluation.decode_steps import held_bytes, plan_of
from kvcompress.evaluation.timing import Spread, timed, times_faster
from kvcompress.methods.head_aware_compress import HeadAwareCompressor

DENSE = "dense"
app = typer.Typer(add_completion=False)


@dataclass
class PrefillCost:
    """One contender at one length; `faster` is the median ratio to `DENSE`."""

    contender: str
    tokens: int
    ms: float
    p10: float
    p90: float
    tokens_per_s: float
    faster: float
    cache_mb: float
    peak_mb: float | None


def prefill(model: PreTrainedModel, new_cache: Callable[[], Any], ids: Tensor, chunk: int) -> Any:
    """Feed ids `[batch, column]` in chunks to a new cache and return it."""
    cache = new_cache()
    for piece in ids.split(chunk, dim=1):
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def compare(
    model: PreTrainedModel, tokens: int, chunks: list[int], share: float, full_heads: float, rounds: int
) -> list[PrefillCost]:
    """Time all ways to read a prompt of this length, `rounds` times each after one that is thrown away."""
    config, device = model.config, model.device
    compressor = HeadAwareCompressor.from_plan(plan_of(config, tokens, share, full_heads))
    streaming = partial(compressor.new_cache, config, "streaming")
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        DENSE: (partial(DynamicCache, config=config), tokens),
        "exact": (partial(compressor.new_cache, config, "exact"), tokens),
        "streaming": (streaming, tokens),
    }
    for chunk in chunks:
        ways |= {f"{name}, chunks of {chunk}": (ways[name][0], chunk) for name in (DENSE, "streaming")}
    ids = torch.randint(config.vocab_size, (1, tokens), device=device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    sizes: dict[str, tuple[float, float | None]] = {}
    for turn in range(rounds + 1):
        for name, (new_cache, chunk) in ways.items():
            forget(device)
            before = 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            with nullcontext() if name.startswith(DENSE) else attached(model):
                cache, spent = timed(partial(prefill, model, new_cache, ids, chunk), [device])
            if turn:
                times[name].append(spent)
            peak = (torch.cuda.max_memory_allocated(device) - before) / 1e6 if device.type == "cuda" else None
            sizes[name] = held_bytes(cache) / 1e6, peak
            del cache
    costs = []
    for name in ways:
        spread = Spread.of(times[name])
        faster = times_faster(times[DENSE], times[name])
        costs.append(PrefillCost(name, tokens, *spread, 1000 * tokens / spread.median, faster, *sizes[name]))
    return costs


def show(costs: list[PrefillCost]) -> None:
    """Print the costs as a table."""
    table = Table("prefill", "tokens", "ms", "tokens/s", "× dense", "cache MB", "peak MB")
    for cost in costs:
        numbers = f"{cost.ms:.1f}", f"{cost.tokens_per_s:,.0f}", f"{cost.faster:.2f}", f"{cost.cache_mb:.1f}"
        peak = "–" if cost.peak_mb is None else f"{cost.peak_mb:,.0f}"
        table.add_row(cost.contender, str(cost.tokens), *numbers, peak)
    Console(width=110).print(table)


@app.command()
def main(
    tokens: Annotated[list[int], typer.Option(min=1, help="Prompt lengths (repeatable).")] = [8192, 32768],  # noqa: B006
    chunk: Annotated[list[int], typer.Option(min=1, help="Tokens a chunk (repeatable).")] = [512, 1024, 4096],  # noqa: B006
    share: Annotated[float, typer.Option(help="Share of the slots that the plan keeps of a prompt.")] = 0.25,
    full_heads: Annotated[float, typer.Option(help="Part of the KV heads that stay full in it.")] = 0.125,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every contender.")] = 3,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model, to try the program.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file as well.")] = None,
) -> None:
    """Time the prefill of long prompts, dense and compressed."""
    with said_in_a_sentence():
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device is cuda, but there is no CUDA device here")
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        name = "tiny" if tiny else "llama-3-8b"
        model = random_model(config_of(name), dtype, torch.device(device))
        costs = [cost for n in tokens for cost in compare(model, n, chunk, share, full_heads, rounds)]
    show(costs)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "share": share,
        "full_heads": full_heads,
        "costs": [asdict(cost) for cost in costs],
    }
    if output is None:
        typer.echo(json.dumps(result))
    else:
        write_json(output, result)


if __name__ == "__main__":
    app()
