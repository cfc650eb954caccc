"""What choosing keys costs: an exact prefill and decode steps of plans that select, beside a window plan of equal bytes.

    python -m benchmarks.select_cost --output select_cost.json
    python -m benchmarks.select_cost --tiny --device cpu
    python -m benchmarks.select_cost --like plans/select-25.json --like plans/select-12.5.json

Llama-3-8B with random weights. Every head has the same slots: of the window plan all but the sinks are a window, of the
others half are chosen by the score that names them. With `--like` its heads keep, in turn, what those of another model's
plan do, each as many slots as there and by scores of several kinds, beside a window plan of as many slots in all.

A turn reads the prompt anew and decodes `steps` tokens, by captured steps where the device can; choices that come due
among them are part of it. Contenders take turns, and ratios are those of runs side by side. `scoring` is what the prefill
takes beyond the window plan's, as a share of its own time.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.step_models import config_of, random_model
from benchmarks.step_parts import forget
from kvcompress.cache.cuda_graph import GraphedDecoder
from kvcompress.cache.dispatch import attached
from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.core.plan import RetentionPlan
from kvcompress.evaluation.timing import timed, times_faster
from kvcompress.methods.head_aware_compress import HeadAwareCompressor
from kvcompress.models.architecture import Architecture
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule

WINDOW, SINKS = "window", 4
FIRST = 3  # steps before those that are timed: to compile, to capture, to replay
app = typer.Typer(add_completion=False)


@dataclass
class SelectCost:
    """One contender: medians in milliseconds, and its decode step's time divided by that of the window plan `rival`.

    `slots` are those of a KV head on average.
    """

    contender: str
    rival: str
    slots: float
    tokens: int
    batch: int
    captured: bool
    prefill_ms: float
    scoring: float
    step_ms: float
    step_ratio: float
    cache_mb: float
    evidence_mb: float


@dataclass(frozen=True)
class Entrant:
    compressor: HeadAwareCompressor
    rival: str
    slots: float


Entrants = dict[str, Entrant]


def of_scores(config: Any, slots: int, names: Sequence[str], choosing: SelectionRule) -> Entrants:
    """The window plan and one plan for each score, all with `slots` slots a head."""
    chosen = (slots - SINKS) // 2
    make = partial(HeadAwareCompressor.from_model_config, config, sink_size=SINKS, choosing=choosing)
    found = {WINDOW: Entrant(make("sink_window", window_size=slots - SINKS), WINDOW, slots)}
    for name in names:
        compressor = make("select", window_size=slots - SINKS - chosen, select_size=chosen, score=name)
        found[name] = Entrant(compressor, WINDOW, slots)
    return found


def like(config: Any, name: str, plan: RetentionPlan, tokens: int, choosing: SelectionRule) -> Entrants:
    """The heads of a plan in turn, and a window plan of as many slots after `tokens` tokens."""
    shape = Architecture.of_config(config)
    theirs = [kept for layer in plan.layers for kept in layer]
    layers, width = range(shape.num_layers), shape.num_key_value_heads
    mine = [[theirs[(layer * width + head) % len(theirs)] for head in range(width)] for layer in layers]
    slots = sum(kept.held(tokens) for layer in mine for kept in layer) / (shape.num_layers * width)
    rival = f"{WINDOW} of {round(slots)}"
    same = HeadAwareCompressor.from_model_config(config, "sink_window", SINKS, round(slots) - SINKS)
    compressor = HeadAwareCompressor(mine, query_heads=False, choosing=choosing)
    return {rival: Entrant(same, rival, round(slots)), name: Entrant(compressor, rival, slots)}


@torch.no_grad()
def turn(
    model: PreTrainedModel, compressor: HeadAwareCompressor, ids: Tensor, steps: int
) -> tuple[float, float, bool, float, float]:
    """Milliseconds of a prefill and of a step after it, whether steps were captured, megabytes of cache and evidence."""
    forget(model.device)
    with attached(model):
        cache = compressor.new_cache(model.config, "exact")
        read = partial(model, ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        out, prefill = timed(read, [model.device])
        decoder = GraphedDecoder(model, cache, FIRST + steps)
        last = decoder.decode(out.logits[:, -1].argmax(-1), FIRST)[:, -1]
        _, spent = timed(partial(decoder.decode, last, steps), [model.device])
    return prefill, spent / steps, decoder.captured, cache.nbytes / 1e6, cache.evidence_nbytes / 1e6


def compare(
    model: PreTrainedModel, entrants: Entrants, tokens: int, batch: int, steps: int, rounds: int
) -> list[SelectCost]:
    """Every contender's costs, from `rounds` turns each after one that is thrown away."""
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)
    found: dict[str, list[tuple[float, float, bool, float, float]]] = {name: [] for name in entrants}
    for _ in range(rounds + 1):
        for name, entrant in entrants.items():
            found[name].append(turn(model, entrant.compressor, ids, steps))
    columns = {name: list(zip(*turns[1:], strict=True)) for name, turns in found.items()}
    costs = []
    for name, (prefills, each, captured, held, evidence) in columns.items():
        rival, slots = entrants[name].rival, entrants[name].slots
        scoring, ratio = 1 - times_faster(columns[rival][0], prefills), times_faster(each, columns[rival][1])
        spent = median(prefills), scoring, median(each), ratio
        costs.append(SelectCost(name, rival, slots, tokens, batch, all(captured), *spent, held[0], evidence[0]))
    return costs


def show(costs: Sequence[SelectCost]) -> None:
    """Print the costs as a table."""
    table = Table(
        "plan", "tokens", "batch", "prefill ms", "scoring", "step ms", "÷ window's", "cache MB", "evidence MB"
    )
    for cost in costs:
        numbers = f"{cost.prefill_ms:.1f}", f"{cost.scoring:.1%}", f"{cost.step_ms:.3f}", f"{cost.step_ratio:.3f}"
        sizes = f"{cost.cache_mb:.1f}", f"{cost.evidence_mb:.1f}"
        table.add_row(cost.contender, str(cost.tokens), str(cost.batch), *numbers, *sizes)
    Console(width=120).print(table)


@app.command()
def main(
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of the prompt.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    share: Annotated[float, typer.Option(help="Share of the prompt that every head holds.")] = 0.25,
    score: Annotated[list[str], typer.Option(help="Scores (repeatable) [default: all].")] = [],  # noqa: B006
    like_plan: Annotated[
        list[Path],
        typer.Option("--like", help="Instead of scores: plan files whose heads these shall be like (repeatable)."),
    ] = [],  # noqa: B006
    every: Annotated[int, typer.Option(min=1, help="Tokens between two choices.")] = SelectionRule.every,
    observe: Annotated[
        int, typer.Option(min=1, help="Last queries that a later choice goes by.")
    ] = SelectionRule.observe,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps a turn: some multiple of --every.")] = 2
    * SelectionRule.every,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every contender.")] = 3,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model and prompt, to try the program.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file as well.")] = None,
) -> None:
    """Time exact prefill and decoding of plans that select, and of a window plan of the same bytes."""
    with said_in_a_sentence():
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("device is cuda, but there is no CUDA device here")
        if tiny:
            tokens, every, steps = 96, 8, 16
        slots = round(share * tokens)
        if slots < SINKS + 2:
            raise InputError(f"{share:.0%} of {tokens} tokens are {slots} slots, expected at least {SINKS + 2}")
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        name = "tiny" if tiny else "llama-3-8b"
        model = random_model(config_of(name), dtype, torch.device(device))
        choosing = SelectionRule(every, observe)
        plans = {path.stem: RetentionPlan.load(path) for path in like_plan}
        entrants = {} if plans else of_scores(model.config, slots, score or list(SCORES), choosing)
        for stem, plan in plans.items():
            entrants |= like(model.config, stem, plan, tokens, choosing)
        costs = compare(model, entrants, tokens, batch, steps, rounds)
    show(costs)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "like": {stem: plan.model_id for stem, plan in plans.items()},
        "every": every,
        "observe": observe,
        "steps": steps,
        "costs": [asdict(cost) for cost in costs],
    }
    if output is None:
        typer.echo(json.dumps(result))
    else:
        write_json(output, result)


if __name__ == "__main__":
    app()
