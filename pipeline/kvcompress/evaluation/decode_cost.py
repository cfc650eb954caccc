"""What one decoded token costs with a compressed cache and with transformers' own, side by side.

    python -m kvcompress.evaluation.decode_cost MODEL_FOLDER --context 64 --context 8000 --batch 1 --share 0.25

The contenders take turns in one process, so that a busy machine slows all of them. Two things are timed: the whole
decode step of the model, and append + attention of all layers alone. Caches are filled with random keys and values,
because the time does not depend on them; with `--random-weights` the folder needs a config.json only. A share of 1 is
a plan that keeps everything. It measures time, not quality, and no memory beyond the bytes that a cache reports.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvcompress.artifacts import write_json
from kvcompress.cache.shape import ModelShape
from kvcompress.errors import InputError, KVCompressError
from kvcompress.methods import HeadAwareCompressor
from kvcompress.plan import RetentionPlan
from kvcompress.retention import FULL, Retention

DENSE = "DynamicCache"
app = typer.Typer(add_completion=False)


@dataclass
class Cost:
    """Median milliseconds of one contender at one context length; `ratio` compares with `DynamicCache`."""

    contender: str
    context: int
    batch: int
    megabytes: float
    step_ms: float
    step_ratio: float
    attention_ms: float
    attention_ratio: float


def plan_of(config: Any, context: int, share: float, full_heads: float) -> RetentionPlan:
    """A plan that keeps `share` of the slots at `context` tokens: a fraction of heads full, the rest 4 sinks + window.

    Raises `InputError` where the full heads alone exceed the share.
    """
    shape = ModelShape.of_config(config)
    heads = shape.layers * shape.kv_heads
    full = [share == 1 or int((i + 1) * full_heads) > int(i * full_heads) for i in range(heads)]
    rest = heads - sum(full)
    slots = int((share * heads - sum(full)) * context / rest) if rest else 0
    if rest and slots < 5:
        raise InputError(f"{sum(full)} full heads of {heads} leave {slots} slots a head at a share of {share}")
    kept = [FULL if whole else Retention(4, slots - 4) for whole in full]
    rows = tuple(tuple(kept[i : i + shape.kv_heads]) for i in range(0, heads, shape.kv_heads))
    return RetentionPlan(rows, config.num_attention_heads)


def fill(cache: Any, config: Any, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> Any:
    """Fill a cache with random keys and values as if `context` tokens had been seen."""
    shape = ModelShape.of_config(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index in range(shape.layers):
        keys, values = torch.randn(2, batch, shape.kv_heads, context, size, dtype=dtype, device=device)
        layer = cache.layers[index]
        if isinstance(cache, DynamicCache):
            layer.update(keys, values)
        else:
            layer.fill(keys, values)
    return cache


def attention_step(cache: Any, query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Append one token to every layer and attend, with nothing of the model around it."""
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // keys.shape[1], is_causal=True)
    for layer in cache.layers:
        if isinstance(cache, DynamicCache):
            held_keys, held_values = layer.update(keys, values)
            sdpa_attention_forward(module, query, held_keys, held_values, None)
        else:
            layer.attend(query, keys, values, None, 0.0)


def clock(act: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds that one call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def measure(
    model: PreTrainedModel, plans: dict[str, RetentionPlan], context: int, batch: int, rounds: int
) -> list[Cost]:
    """Time every plan and `DynamicCache` in turns, `rounds` times each after two rounds that are thrown away."""
    config, device, dtype = model.config, model.device, model.dtype
    compressors = {name: HeadAwareCompressor.from_plan(plan) for name, plan in plans.items()}
    caches: dict[str, Any] = {DENSE: DynamicCache(config=config)}
    caches |= {name: compressor.new_cache(config, "streaming") for name, compressor in compressors.items()}
    for cache in caches.values():
        fill(cache, config, batch, context, dtype, device)
    shape = ModelShape.of_config(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = torch.randn(batch, config.num_attention_heads, 1, size, dtype=dtype, device=device)
    keys, values = torch.randn(2, batch, shape.kv_heads, 1, size, dtype=dtype, device=device)
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)
    steps: dict[str, list[float]] = {name: [] for name in caches}
    alone: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(rounds + 2):
        order = list(caches) if turn % 2 else list(reversed(caches))
        for name in order:
            reading = compressors[name].attached(model) if name in compressors else nullcontext()
            with reading:
                act = partial(model, ids, past_key_values=caches[name], use_cache=True)
                steps[name].append(clock(act, device))
        for name in order:
            alone[name].append(clock(partial(attention_step, caches[name], query, keys, values), device))
    costs = []
    for name, cache in caches.items():
        step, attention = median(steps[name][2:]), median(alone[name][2:])
        held = 2 * keys.element_size() * batch * shape.kv_heads * context * size * shape.layers
        costs.append(
            Cost(
                name,
                context,
                batch,
                (held if name == DENSE else cache.nbytes) / 1e6,
                step,
                median(steps[DENSE][2:]) / step,
                attention,
                median(alone[DENSE][2:]) / attention,
            )
        )
    return costs


def show(costs: list[Cost]) -> None:
    """Print the costs as a table."""
    table = Table("cache", "context", "batch", "MB", "step ms", "× faster", "attention ms", "× faster")
    for cost in costs:
        row = (cost.megabytes, cost.step_ms, cost.step_ratio, cost.attention_ms, cost.attention_ratio)
        table.add_row(cost.contender, str(cost.context), str(cost.batch), *(f"{number:.2f}" for number in row))
    Console(width=110).print(table)


@app.command()
@torch.no_grad()
def main(
    folder: Annotated[Path, typer.Argument(help="Model folder; with --random-weights a config.json is enough.")],
    context: Annotated[list[int], typer.Option(help="Tokens of context (repeatable).")] = [64, 8000],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Sequences in the batch (repeatable).")] = [1],  # noqa: B006
    share: Annotated[list[float], typer.Option(help="Share of the slots kept (repeatable); 1 is all.")] = [1.0, 0.25],  # noqa: B006
    full_heads: Annotated[float, typer.Option(help="Part of the KV heads that stay full, in a second plan.")] = 0.13,
    plan: Annotated[list[Path], typer.Option(help="A retention plan file to time as well (repeatable).")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every contender.")] = 15,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads, 0 for torch's default.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    random_weights: Annotated[bool, typer.Option(help="Build the model from its config, untrained.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file as well.")] = None,
) -> None:
    """Time one decoded token with compressed caches and with DynamicCache, in turns."""
    if threads:
        torch.set_num_threads(threads)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    try:
        if kind is None:
            raise InputError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
        config = AutoConfig.from_pretrained(folder)
        if random_weights:
            model = AutoModelForCausalLM.from_config(config, dtype=kind)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
        model = model.to(device).eval()
        costs: list[Cost] = []
        for tokens in context:
            plans = {f"{part:.0%} uniform": plan_of(config, tokens, part, 0.0) for part in share}
            plans |= {
                f"{part:.0%}, {full_heads:.0%} of heads full": plan_of(config, tokens, part, full_heads)
                for part in share
                if full_heads < part < 1
            }
            plans |= {file.name: RetentionPlan.load(file) for file in plan}
            for rows in batch:
                costs += measure(model, plans, tokens, rows, rounds)
    except (KVCompressError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    show(costs)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "costs": [asdict(cost) for cost in costs]}
    if output is None:
        typer.echo(json.dumps(result))
    else:
        write_json(output, result)


if __name__ == "__main__":
    app()
