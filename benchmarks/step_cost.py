"""What whole decode steps cost on a GPU, with the full cache and with a plan that keeps a quarter of it.

    python -m benchmarks.step_cost --output step_cost.json
    python -m benchmarks.step_cost --tiny --device cpu

Parts: `step` times a step of Pythia-2.8b (batch 32, 2,048 tokens), captured in a CUDA graph and as a user has it today;
`memory` compares the peaks of device memory of the same runs with what the plan predicts; `batch` finds the largest
batch of Llama-3-8B with 8,192 tokens within 60 GB by real runs; `growth` times Llama-3-8B steps at growing context and
batch, where they fit. Weights are random. `step_parts` says how it is measured.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.step_models import config_of, kept_bytes, random_model
from benchmarks.step_parts import (
    DYNAMIC,
    EAGER,
    FULL,
    PLAN,
    STATIC,
    StepCost,
    compare_steps,
    forget,
    largest_batch,
    peak_bytes,
)
from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.core.plan import RetentionPlan
from kvcompress.evaluation.decode_growth import weight_bytes
from kvcompress.evaluation.decode_steps import plan_of
from kvcompress.evaluation.timing import copy_bandwidth

PARTS = ("step", "memory", "batch", "growth")
TURNS = ((STATIC, PLAN), (FULL, PLAN), (DYNAMIC, PLAN, EAGER))  # who takes turns: all at once would not fit
MEMORY_STEPS = 16
app = typer.Typer(add_completion=False)


class Sizes:
    """What is measured: for real, or so tiny that any machine can run it."""

    def __init__(self, tiny: bool) -> None:
        self.step_model, self.batch_model = ("tiny", "tiny") if tiny else ("pythia-2.8b", "llama-3-8b")
        self.step_batch, self.step_context = (2, 80) if tiny else (32, 2048)
        self.batch_context, self.cap = (64, 1.2e6) if tiny else (8192, 60e9)
        self.contexts = (64, 80) if tiny else (512, 2048, 8192, 32768, 131072)
        self.batches = (1, 2) if tiny else (1, 8, 32)


def plans_of(model: PreTrainedModel, context: int, share: float, full_heads: float) -> dict[str, RetentionPlan]:
    """The plan that keeps all, and the one that keeps `share`."""
    return {
        FULL: plan_of(model.config, context, 1.0, 0.0),
        PLAN: plan_of(model.config, context, share, full_heads),
    }


def memory_of(model: PreTrainedModel, plans: dict[str, RetentionPlan], batch: int, context: int) -> dict[str, float]:
    """Peaks of both plans, and how much less the second takes, measured and by the plan alone."""
    kept, peak = {}, {}
    for name, plan in plans.items():
        kept[name] = batch * kept_bytes(plan, model.config, context, model.dtype)
        peak[name] = peak_bytes(model, plan, batch, context, MEMORY_STEPS)
    saved, predicted = peak[FULL] - peak[PLAN], kept[FULL] - kept[PLAN]
    return {"full_peak": peak[FULL], "plan_peak": peak[PLAN], "saved": saved, "predicted": predicted,
            "saved_of_predicted": saved / predicted}  # fmt: skip


def batches_of(model: PreTrainedModel, plans: dict[str, RetentionPlan], context: int, cap: float) -> dict[str, float]:
    """The largest batch of both plans within `cap` bytes."""
    full, plan = (largest_batch(model, plans[name], context, cap) for name in (FULL, PLAN))
    return {"context": context, "cap_bytes": cap, "full": full, "plan": plan, "ratio": plan / max(full, 1)}


def growth_of(
    model: PreTrainedModel,
    sizes: Sizes,
    share: float,
    full_heads: float,
    bandwidth: float,
    rounds: int,
    steps: int,
) -> list[StepCost]:
    """Steps of both plans under capture wherever both caches and the weights fit into nine tenths of the device."""
    room, costs = float("inf"), []
    if model.device.type == "cuda":
        room = 0.9 * torch.cuda.get_device_properties(model.device).total_memory
    cells = [(context, batch) for context in sizes.contexts for batch in sizes.batches]
    for context, batch in tqdm(cells, desc="growth", unit="cell"):
        plans = plans_of(model, context, share, full_heads)
        kept = batch * sum(kept_bytes(plan, model.config, context, model.dtype) for plan in plans.values())
        if weight_bytes(model) + kept < room:
            costs += compare_steps((FULL, PLAN), model, plans, batch, context, bandwidth, rounds, steps)
            forget(model.device)
    return costs


def show(title: str, costs: list[StepCost]) -> None:
    """Print the costs as a table; ratios are to the full cache that took turns with them."""
    table = Table(
        "contender", "batch", "context", "graph", "ms", "tokens/s", "limit ms", "of limit", "× full", title=title
    )
    for cost in costs:
        ratio = next((cost.faster_than[name] for name in (STATIC, FULL, DYNAMIC) if name in cost.faster_than), 1.0)
        numbers = f"{cost.ms:.3f}", f"{cost.tokens_per_s:,.0f}", f"{cost.limit_ms:.3f}", f"{cost.share_of_limit:.2f}"
        graph = "yes" if cost.captured else "no"
        table.add_row(cost.contender, str(cost.batch), str(cost.context), graph, *numbers, f"{ratio:.2f}")
    Console(width=120).print(table)


@app.command()
def main(
    part: Annotated[list[str], typer.Option(help="step, memory, batch or growth (repeatable).")] = list(PARTS),  # noqa: B006
    share: Annotated[float, typer.Option(help="Share of the slots that the plan keeps.")] = 0.25,
    full_heads: Annotated[float, typer.Option(help="Part of the KV heads that stay full in it.")] = 0.125,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every contender.")] = 11,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a turn.")] = 8,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model and short contexts, to try the program.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file as well.")] = None,
) -> None:
    """Time whole decode steps, and find what fits, with the full cache and with a plan."""
    with said_in_a_sentence():
        for name in part:
            if name not in PARTS:
                raise InputError(f"part is {name!r}, expected one of {', '.join(PARTS)}")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device is cuda, but there is no CUDA device here")
        result = measured(part, share, full_heads, rounds, steps, torch.device(device), Sizes(tiny))
    if output is None:
        typer.echo(json.dumps(result))
    else:
        write_json(output, result)


def measured(
    part: list[str],
    share: float,
    full_heads: float,
    rounds: int,
    steps: int,
    device: torch.device,
    sizes: Sizes,
) -> dict[str, Any]:
    """The parts, one model at a time, with what they were measured on."""
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth = copy_bandwidth(device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "copy_gb_per_s": bandwidth / 1e9,
        "share": share,
        "full_heads": full_heads,
    }
    if {"step", "memory"} & set(part):
        model = random_model(config_of(sizes.step_model), dtype, device)
        batch, context = sizes.step_batch, sizes.step_context
        plans = plans_of(model, context, share, full_heads)
        if "step" in part:
            costs = []
            for names in TURNS:
                costs += compare_steps(names, model, plans, batch, context, bandwidth, rounds, steps)
                forget(device)
            show(sizes.step_model, costs)
            result["step"] = {"model": sizes.step_model, "costs": [asdict(cost) for cost in costs]}
            forget(device)
        if "memory" in part:
            result["memory"] = {"model": sizes.step_model} | memory_of(model, plans, batch, context)
            typer.echo(f"memory: {result['memory']}", err=True)
        del model
        forget(device)
    if {"batch", "growth"} & set(part):
        model = random_model(config_of(sizes.batch_model), dtype, device)
        if "batch" in part:
            plans = plans_of(model, sizes.batch_context, share, full_heads)
            found = batches_of(model, plans, sizes.batch_context, sizes.cap)
            result["batch"] = {"model": sizes.batch_model} | found
            typer.echo(f"batch: {result['batch']}", err=True)
        if "growth" in part:
            costs = growth_of(model, sizes, share, full_heads, bandwidth, max(rounds // 2, 1), steps)
            show(sizes.batch_model, costs)
            result["growth"] = {"model": sizes.batch_model, "costs": [asdict(cost) for cost in costs]}
    return result


if __name__ == "__main__":
    app()
