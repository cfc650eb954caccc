"""Cost of a prompt: full and compressed prefill, and strategy select's choice of keys.

    python -m benchmarks.prefill prompts --output prefill_cost.json
    python -m benchmarks.prefill prompts --tokens 131072             # long documents
    python -m benchmarks.prefill select --output select_cost.json    # scores, at equal bytes
    python -m benchmarks.prefill select --like select-25.json        # heads like those of a plan
    python -m benchmarks.prefill prompts --tiny --device cpu         # either in seconds, to try it

The model is Llama-3-8B with random weights; a plan keeps a quarter of the cache.

`prompts` reads one row. `dense` is a `DynamicCache` read by SDPA; `exact` attends to the whole prompt and evicts at its
end; `streaming` shows every query only what its head holds, in one pass or in chunks, which bound the memory. Dense
prompts come in chunks too, because short passes cost the host more. Peaks are above the weights, the cache included.

`select` reads a prompt exactly, then decodes `--steps` tokens, captured where the device can; selections that fall due
among them are timed with them. Every head has the same slots: the window plan fills them with its window, the others
with half a window and half keys ranked by the named score. With `--like`, heads take the retentions of another model's
plan in turn, against windows of as many slots in all. `scoring` is the share of the prefill beyond that of the windows.

Contenders take turns; ratios are medians of the rounds' ratios. Nothing here measures quality, or decoding at length
(see `benchmarks.decode`).
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks import _models, _timing
from benchmarks.decode import FULL_HEADS, SHARE, Device, Output, Tiny
from kvcompress.cache.cuda_graph import GraphedDecoder
from kvcompress.cache.dispatch import attached
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.core.plan import RetentionPlan
from kvcompress.evaluation.decode_steps import held_bytes, plan_of
from kvcompress.evaluation.timing import Spread, timed, times_faster
from kvcompress.methods.head_aware_compress import HeadAwareCompressor
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule

DENSE, WINDOW, SINKS = "dense", "window", 4
FIRST = 3  # steps before those that are timed: to compile, to capture, to replay
app = typer.Typer(add_completion=False, help="Time prompts.")
Rounds = Annotated[int, typer.Option(min=1, help="Timed turns of every contender.")]


def start(device: str, tiny: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what its results are recorded with."""
    where, name = _timing.device_of(device), "tiny" if tiny else "llama-3-8b"
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = _models.random_model(_models.config_of(name), dtype, where)
    return model, _timing.machine(where, dtype) | {"model": name}


# ---- Prompts ----


def read(model: PreTrainedModel, new_cache: Callable[[], Any], ids: Tensor, chunk: int) -> Any:
    """Feed ids `[batch, token]` in chunks to a new cache and return it."""
    cache = new_cache()
    for piece in ids.split(chunk, dim=1):
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def prompt_costs(model: PreTrainedModel, tokens: int, chunks: list[int], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds, bytes of the cache and peak bytes of every way to read a prompt, one row each."""
    config, device = model.config, model.device
    compressor = HeadAwareCompressor.from_plan(plan_of(config, tokens, SHARE, FULL_HEADS))
    caches: dict[str, Callable[[], Any]] = {DENSE: partial(DynamicCache, config=config)}
    caches |= {name: partial(compressor.new_cache, config, name) for name in ("exact", "streaming")}
    ways = {name: (new_cache, tokens) for name, new_cache in caches.items()}
    ways |= {f"{name}, chunks of {chunk}": (caches[name], chunk) for chunk in chunks for name in (DENSE, "streaming")}
    ids = torch.randint(config.vocab_size, (1, tokens), device=device)

    def turn(name: str) -> tuple[float, float, float | None]:
        _models.release(device)
        found: list[Any] = []
        with nullcontext() if name.startswith(DENSE) else attached(model):
            act = partial(timed, partial(read, model, ways[name][0], ids, ways[name][1]), [device])
            peak = _timing.peak_above(lambda: found.extend(act()), device) if device.type == "cuda" else None
            cache, spent = found or act()
        return spent, held_bytes(cache) / 1e6, peak and peak / 1e6

    turns = _timing.in_turns({name: partial(turn, name) for name in ways}, rounds, warm_up=1)
    times = {name: [one[0] for one in found] for name, found in turns.items()}
    costs = []
    for name, found in turns.items():
        spread = Spread.of(times[name])
        costs.append(
            {"contender": name, "tokens": tokens, "ms": spread.median, "p10": spread.p10, "p90": spread.p90}
            | {"tokens_per_s": 1000 * tokens / spread.median, "faster": times_faster(times[DENSE], times[name])}
            | {"cache_mb": found[-1][1], "peak_mb": found[-1][2]}
        )
    return costs


@app.command()
def prompts(
    tokens: Annotated[list[int], typer.Option(min=1, help="Prompt lengths (repeatable).")] = [8192, 32768],  # noqa: B006
    chunk: Annotated[list[int], typer.Option(min=1, help="Tokens a chunk (repeatable).")] = [512, 1024, 4096],  # noqa: B006
    rounds: Rounds = 3,
    device: Device = "cuda",
    tiny: Tiny = False,
    output: Output = None,
) -> None:
    """Time the prefill of long prompts, dense and compressed."""
    with said_in_a_sentence():
        if tiny:
            tokens, chunk = [60], [25]
        model, about = start(device, tiny)
        costs = [cost for count in tokens for cost in prompt_costs(model, count, chunk, rounds)]
    _timing.show(f"prompts of {about['model']}", costs)
    _timing.publish(about | {"share": SHARE, "full_heads": FULL_HEADS, "costs": costs}, output)


# ---- Selection ----

Contenders = dict[str, tuple[HeadAwareCompressor, str, float]]  # compressor, its rival, slots of a KV head on average


def of_scores(config: Any, slots: int, names: list[str], rule: SelectionRule) -> Contenders:
    """The window plan and one plan for each score, all with `slots` slots a head."""
    chosen, make = (slots - SINKS) // 2, partial(HeadAwareCompressor.from_model_config, config, sink_size=SINKS)
    found: Contenders = {WINDOW: (make("sink_window", window_size=slots - SINKS, selection_rule=rule), WINDOW, slots)}
    for name in names:
        window = slots - SINKS - chosen
        selecting = make("select", window_size=window, select_size=chosen, score=name, selection_rule=rule)
        found[name] = selecting, WINDOW, slots
    return found


def like(config: Any, name: str, plan: RetentionPlan, tokens: int, rule: SelectionRule) -> Contenders:
    """A model whose heads take a plan's retentions in turn, and windows of as many slots after `tokens` tokens."""
    theirs = [kept for layer in plan.layers for kept in layer]
    layers, width = range(config.num_hidden_layers), _models.kv_heads(config)
    mine = [[theirs[(layer * width + head) % len(theirs)] for head in range(width)] for layer in layers]
    slots = sum(kept.held(tokens) for layer in mine for kept in layer) / (len(layers) * width)
    rival = f"{WINDOW} of {round(slots)}"
    same = HeadAwareCompressor.from_model_config(config, "sink_window", SINKS, round(slots) - SINKS)
    compressor = HeadAwareCompressor(mine, query_heads=False, selection_rule=rule)
    return {rival: (same, rival, round(slots)), name: (compressor, rival, slots)}


@torch.no_grad()
def select_turn(
    model: PreTrainedModel, compressor: HeadAwareCompressor, ids: Tensor, steps: int
) -> tuple[float, float, bool, float, float]:
    """Milliseconds of a prefill and of a step after it, captured or not, megabytes of the cache and of kept queries."""
    _models.release(model.device)
    with attached(model):
        cache = compressor.new_cache(model.config, "exact")
        prompt = partial(model, ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        out, prefill = timed(prompt, [model.device])
        decoder = GraphedDecoder(model, cache, FIRST + steps)
        last = decoder.decode(out.logits[:, -1].argmax(-1), FIRST)[:, -1]
        _, spent = timed(partial(decoder.decode, last, steps), [model.device])
    return prefill, spent / steps, decoder.captured, cache.nbytes / 1e6, cache.evidence_nbytes / 1e6


def select_costs(
    model: PreTrainedModel, contenders: Contenders, ids: Tensor, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """One row a contender; `step_ratio` is its step's time divided by that of its rival."""
    acts = {name: partial(select_turn, model, one[0], ids, steps) for name, one in contenders.items()}
    turns = _timing.in_turns(acts, rounds, warm_up=1)
    columns: Mapping[str, list[Any]] = {name: list(zip(*found, strict=True)) for name, found in turns.items()}
    costs = []
    for name, (prefills, each, captured, held, evidence) in columns.items():
        _, rival, slots = contenders[name]
        costs.append(
            {"contender": name, "rival": rival, "slots": slots, "tokens": ids.shape[1], "batch": ids.shape[0]}
            | {"captured": all(captured), "prefill_ms": median(prefills), "step_ms": median(each)}
            | {"scoring": 1 - times_faster(columns[rival][0], prefills)}
            | {"step_ratio": times_faster(each, columns[rival][1]), "cache_mb": held[0], "evidence_mb": evidence[0]}
        )
    return costs


@app.command()
def select(
    tokens: Annotated[int, typer.Option(min=24, help="Tokens of the prompt.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    score: Annotated[list[str], typer.Option(help="Scores (repeatable) [default: all].")] = [],  # noqa: B006
    like_plan: Annotated[list[Path], typer.Option("--like", help="Plan files instead of scores (repeatable).")] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Decode steps a turn.")] = 2 * SelectionRule.every,
    rounds: Rounds = 3,
    device: Device = "cuda",
    tiny: Tiny = False,
    output: Output = None,
) -> None:
    """Time exact prefill and decoding of plans that select keys, and of window plans of the same bytes."""
    with said_in_a_sentence():
        unknown = [name for name in score if name not in SCORES]
        if unknown:
            raise InputError(f"--score is {unknown[0]!r}, expected one of {', '.join(SCORES)}")
        rule = SelectionRule(every=8) if tiny else SelectionRule()
        if tiny:
            tokens, steps = 96, 16
        model, about = start(device, tiny)
        plans = {path.stem: RetentionPlan.load(path) for path in like_plan}
        contenders = {} if plans else of_scores(model.config, round(SHARE * tokens), score or list(SCORES), rule)
        for stem, plan in plans.items():
            contenders |= like(model.config, stem, plan, tokens, rule)
        ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)
        costs = select_costs(model, contenders, ids, steps, rounds)
    _timing.show(f"selection, {about['model']}", costs)
    about |= {"like": {stem: plan.model_id for stem, plan in plans.items()}}
    about |= {"every": rule.every, "observe": rule.observe, "steps": steps}
    _timing.publish(about | {"costs": costs}, output)


if __name__ == "__main__":
    app()
