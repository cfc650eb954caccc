"""What whole decode steps of a model cost with the full cache and with a plan: time, memory, the largest batch.

Steps with a compressed cache and with `StaticCache` are replays of a captured step where the device can (`graphs`);
`DynamicCache` and "eager" are the ordinary passes that a user makes today. Times are of several steps in a row, with
no wait between them, in turns; a step's limit is the time to read the weights and the kept K and V at the speed of a
large copy on the same device.
"""

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.step_models import kept_bytes, occupied, occupied_static
from kvcompress.cache.cuda_graph import GraphedDecoder, can_record
from kvcompress.cache.dispatch import attached
from kvcompress.core.errors import InputError
from kvcompress.core.plan import RetentionPlan
from kvcompress.evaluation.decode_growth import weight_bytes
from kvcompress.evaluation.decode_steps import fill
from kvcompress.evaluation.timing import Spread, timed, times_faster

WARM_UP = 2  # turns that are thrown away
FIRST = 3  # steps before the first turn: to compile, to capture, to replay
FULL, PLAN = "full", "plan"  # compressed caches under capture: one that keeps all, and the plan's
STATIC, DYNAMIC, EAGER = "full, StaticCache", "full, DynamicCache eager", "plan, eager"


@dataclass
class StepCost:
    """A contender's decode step in milliseconds; `faster_than` is the median ratio to each of the others."""

    contender: str
    batch: int
    context: int
    captured: bool
    ms: float
    p10: float
    p90: float
    tokens_per_s: float
    limit_ms: float
    share_of_limit: float
    faster_than: dict[str, float] = field(default_factory=dict)


@dataclass
class Contender:
    """`act(n)` makes n steps, inside `reading()`; `kept`: bytes of K and V that a step has to read."""

    act: Callable[[int], Any]
    reading: Callable[[], AbstractContextManager[Any]]
    kept: int
    decoder: GraphedDecoder | None = None


def ordinary_steps(model: PreTrainedModel, cache: Any, tokens: Tensor, count: int) -> None:
    """Greedy passes as a user writes them, `tokens` `[batch]` first."""
    for _ in range(count):
        logits = model(tokens[:, None], past_key_values=cache, use_cache=True).logits
        tokens = logits[:, -1].argmax(-1)


def steps_needed(rounds: int, steps: int) -> int:
    """Tokens that `compare_steps` appends to every cache."""
    return FIRST + (rounds + WARM_UP) * steps


def contender(
    name: str,
    plan: RetentionPlan,
    full: RetentionPlan,
    model: PreTrainedModel,
    batch: int,
    context: int,
    new: int,
) -> Contender:
    """One of `FULL`, `PLAN`, `STATIC`, `DYNAMIC`, `EAGER`, its cache filled so that half of the `new` steps come after
    `context` tokens."""
    config, start = model.config, context - new // 2
    tokens = torch.ones(batch, dtype=torch.long, device=model.device)
    own = plan if name in (PLAN, EAGER) else full
    kept = batch * kept_bytes(own, config, context, model.dtype)
    reading = partial(attached, model) if name in (FULL, PLAN, EAGER) else nullcontext
    if name == DYNAMIC:
        cache = fill(DynamicCache(config=config), config, batch, start, model.dtype, model.device)
        return Contender(partial(ordinary_steps, model, cache, tokens), reading, kept)
    if name == EAGER:
        cache = occupied(own, model, batch, start, new)
        return Contender(partial(ordinary_steps, model, cache, tokens), reading, kept)
    held = occupied_static(model, batch, start, new) if name == STATIC else occupied(own, model, batch, start, new)
    decoder = GraphedDecoder(model, held, new)
    return Contender(partial(decoder.decode, tokens), reading, kept, decoder)


@torch.no_grad()
def compare_steps(
    names: tuple[str, ...],
    model: PreTrainedModel,
    plans: Mapping[str, RetentionPlan],
    batch: int,
    context: int,
    bandwidth: float,
    rounds: int,
    steps: int,
) -> list[StepCost]:
    """Time the contenders in turns. `plans` has `FULL` and `PLAN`, `bandwidth` is in bytes a second.

    Raises `InputError` where the appended tokens do not fit into the context, or where a step that should be captured
    on this device was not.
    """
    new, devices = steps_needed(rounds, steps), [model.device]
    if context <= new:
        raise InputError(f"a context of {context} tokens is shorter than the {new} that are appended")
    entrants = {n: contender(n, plans[PLAN], plans[FULL], model, batch, context, new) for n in names}
    for name, entrant in entrants.items():
        with entrant.reading():
            entrant.act(FIRST)
        if can_record(model.device) and entrant.decoder is not None and not entrant.decoder.captured:
            raise InputError(f"the steps of {name!r} were not captured: the kernel of the cache does not serve here")
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + WARM_UP):
        for name in names if turn % 2 else reversed(names):
            with entrants[name].reading():
                times[name].append(timed(partial(entrants[name].act, steps), devices)[1] / steps)
    times = {name: found[WARM_UP:] for name, found in times.items()}
    costs = []
    for name, entrant in entrants.items():
        spread = Spread.of(times[name])
        limit = 1000 * (weight_bytes(model) + entrant.kept) / bandwidth
        captured = entrant.decoder is not None and entrant.decoder.captured
        ratios = {other: round(times_faster(times[other], times[name]), 4) for other in names if other != name}
        shares = 1000 * batch / spread.median, limit, limit / spread.median
        costs.append(StepCost(name, batch, context, captured, *spread, *shares, ratios))
    return costs


def forget(device: torch.device) -> None:
    """Give back the memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def fits(model: PreTrainedModel, plan: RetentionPlan, batch: int, context: int, cap: float) -> bool:
    """Whether a cache of `context` tokens can be allocated and decode steps be made, all within `cap` bytes.

    On a GPU the allocator itself refuses more than that, weights and temporaries counted; elsewhere weights and cache
    are added up.
    """
    device, steps = model.device, 3
    tokens = torch.ones(batch, dtype=torch.long, device=device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0), device)
    try:
        cache = occupied(plan, model, batch, context - steps, steps)
        with attached(model):
            ordinary_steps(model, cache, tokens, steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return True
        return sum(weight.nbytes for weight in model.parameters()) + cache.peak_nbytes <= cap
    except torch.OutOfMemoryError:
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def largest_batch(model: PreTrainedModel, plan: RetentionPlan, context: int, cap: float) -> int:
    """The most rows that fit, by bisection over real runs; 0 where not even one does."""
    weights = sum(weight.nbytes for weight in model.parameters())
    low, high = 0, max(int((cap - weights) / kept_bytes(plan, model.config, context, model.dtype)), 0) + 1
    while high - low > 1:
        middle = (low + high) // 2
        forget(model.device)
        low, high = (middle, high) if fits(model, plan, middle, context, cap) else (low, middle)
    forget(model.device)
    return low


@torch.no_grad()
def peak_bytes(model: PreTrainedModel, plan: RetentionPlan, batch: int, context: int, steps: int) -> int:
    """The most memory of the device at any moment of making a cache and decoding; on a CPU that of the cache alone."""
    device, tokens = model.device, torch.ones(batch, dtype=torch.long, device=model.device)
    forget(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cache = occupied(plan, model, batch, context - steps, steps)
    with attached(model):
        GraphedDecoder(model, cache, steps).decode(tokens, steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return cache.peak_nbytes
