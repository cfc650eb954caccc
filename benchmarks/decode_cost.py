"""What one decoded token costs with a compressed cache and with transformers' own, side by side.

    python -m benchmarks.decode_cost MODEL_FOLDER --context 64 --context 8000 --batch 1 --share 0.25

What is timed, and how, stands in `decode_steps`. With `--random-weights` the folder needs a config.json only. A share
of 1 is a plan that keeps everything.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.core.plan import RetentionPlan
from kvcompress.evaluation.decode_steps import Cost, measure, plan_of

app = typer.Typer(add_completion=False)


def show(costs: list[Cost]) -> None:
    """Print the costs as a table."""
    table = Table("cache", "context", "batch", "MB", "step ms", "× faster", "attention ms", "× faster")
    for cost in costs:
        row = (cost.megabytes, cost.step_ms, cost.step_ratio, cost.attention_ms, cost.attention_ratio)
        table.add_row(cost.contender, str(cost.context), str(cost.batch), *(f"{number:.2f}" for number in row))
    Console(width=110).print(table)


@app.command()
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
    with said_in_a_sentence():
        if kind is None:
            raise InputError(f"dtype is {dtype!r}, expected float32, bfloat16 or float16")
        config = AutoConfig.from_pretrained(folder)
        if random_weights:
            model = AutoModelForCausalLM.from_config(config, dtype=kind)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, use_safetensors=True)
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
    show(costs)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "costs": [asdict(cost) for cost in costs]}
    if output is None:
        typer.echo(json.dumps(result))
    else:
        write_json(output, result)


if __name__ == "__main__":
    app()
