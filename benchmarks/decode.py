"""Cost of one decoded token: attention in one layer, whole decode steps, the largest batch, a model of your own.

    python -m benchmarks.decode kernel --output kernel_cost.json     # one layer, on a GPU
    python -m benchmarks.decode steps --output step_cost.json        # whole steps, on a GPU
    python -m benchmarks.decode steps --part batch --part growth     # what fits; growth with context and batch
    python -m benchmarks.decode model MODEL_FOLDER --context 8000    # a real model, on any device
    python -m benchmarks.decode kernel --tiny --device cpu           # any of the three in seconds, to try it

`kernel` reads the cache of several layers in one captured CUDA graph, each layer with its own cache, so that neither the
host nor the L2 cache takes part. It compares dense SDPA, SDPA by head group, and the kernel's one launch for all heads.
Appending the token is not timed.

`steps` times greedy steps of models with random weights, several in a row. Full caches are transformers' `StaticCache`
and this library's own cache with a plan that keeps everything; both are captured, as is the plan's. `DynamicCache` and
"eager" run as a user calls them today. A limit is the time to read weights and kept K and V once, at the speed of a
large copy on the same device, timed as the contender is timed.

`model` times a whole step, and append + attention of all layers alone, against `DynamicCache`.

Contenders take turns; ratios are medians of the rounds' ratios. Nothing here measures quality, prompts (see
`benchmarks.prefill`) or sampling.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from benchmarks import _models, _timing
from kvcompress.cache.attend import AttendOptions, attend
from kvcompress.cache.cuda_graph import GraphedDecoder
from kvcompress.cache.dispatch import attached
from kvcompress.cache.padding import Padding
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.core.plan import RetentionPlan
from kvcompress.evaluation.decode_steps import fill, measure, plan_of, weight_bytes
from kvcompress.evaluation.timing import Spread, copy_bandwidth, timed, times_faster
from kvcompress.ops.ragged_decode import GroupSlots, Scratch, decode, table_of
from kvcompress.ops.ragged_decode import kernel as loaded_kernel

SHARE, FULL_HEADS = 0.25, 0.125  # of the cache that the plan keeps, and of the KV heads that it keeps whole
app = typer.Typer(add_completion=False, help="Time one decoded token.")
Device = Annotated[str, typer.Option(help="cuda or cpu.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="A tiny model and few tokens, to try the program.")]
Output = Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file as well.")]

# ---- One layer ----

WINDOW = 4 + 128  # slots of a head that is not full


@dataclass(frozen=True)
class Shape:
    """A layer. `full`: KV heads that hold all tokens; the others hold `WINDOW`."""

    query_heads: int
    kv_heads: int
    size: int
    batch: int
    tokens: int
    full: int

    @property
    def name(self) -> str:
        heads = f"{self.query_heads}/{self.kv_heads} x {self.size}"
        return f"{heads}, batch {self.batch}, {self.tokens} tokens, {self.full} of {self.kv_heads} full"


SHAPES = (
    Shape(32, 8, 128, 16, 8192, 8),
    Shape(32, 8, 128, 16, 8192, 2),
    Shape(32, 8, 128, 16, 8192, 1),
    Shape(32, 32, 80, 16, 2048, 8),
)
TINY_SHAPES = (Shape(8, 4, 64, 2, 300, 1), Shape(4, 4, 80, 2, 300, 4))


class Layer:
    """Random K and V of one layer, `[batch, kv_head, slot, head_dim]`: dense, and kept in two parts."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.query = torch.randn(shape.batch, shape.query_heads, shape.size, dtype=dtype, device=device)
        room = (shape.batch, shape.kv_heads, shape.tokens, shape.size)
        self.keys, self.values = (torch.randn(room, dtype=dtype, device=device) for _ in range(2))
        split = shape.full, shape.kv_heads - shape.full
        (full_keys, keys), (full_values, values) = (t.split(split, dim=1) for t in (self.keys, self.values))
        full = GroupSlots(range(shape.full), full_keys.contiguous(), full_values.contiguous(), None)
        keys, values = (tensor[:, :, :WINDOW].contiguous() for tensor in (keys, values))
        rest = GroupSlots(range(shape.full, shape.kv_heads), keys, values, WINDOW)
        self.parts = [part for part in (full, rest) if part.heads]
        self.table = table_of(self.parts, shape.kv_heads)
        self.seen = torch.tensor([shape.tokens], dtype=torch.int32, device=device)
        self.scratch: Scratch | None = None  # kept: a captured graph goes on using it

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in self.parts for tensor in (part.keys, part.values))

    def dense(self) -> Tensor:
        grouped = self.shape.query_heads != self.shape.kv_heads
        return scaled_dot_product_attention(self.query[:, :, None], self.keys, self.values, enable_gqa=grouped)

    def by_group(self) -> Tensor:
        """Attend group by group, as the cache does without the kernel."""
        query = self.query.view(self.shape.batch, self.shape.kv_heads, -1, 1, self.shape.size)
        out = torch.zeros_like(query)
        for part in self.parts:
            heads = slice(part.heads[0], part.heads[-1] + 1)
            out[:, heads] = attend(query[:, heads], part.keys, part.values, None, AttendOptions(Padding(), None))
        return out.view_as(self.query)

    def kernel(self) -> Tensor:
        out, self.scratch = decode(
            self.query, self.table, self.shape.size, self.seen, scratch=self.scratch, settled=True
        )
        return out


def layer_cost(layers: Sequence[Layer], bandwidth: float, rounds: int) -> dict[str, Any]:
    """Microseconds a layer of each way to read; without a GPU the kernel's are None."""
    device = layers[0].query.device
    acts = {
        "dense": _timing.capture([layer.dense for layer in layers], device),
        "by_group": _timing.capture([layer.by_group for layer in layers], device),
    }
    if device.type == "cuda":
        acts["kernel"] = _timing.capture([layer.kernel for layer in layers], device)
    times = {name: time / len(layers) for name, time in _timing.device_clock(acts, rounds, device).items()}
    kept, dense, kernel = layers[0].nbytes, times["dense"], times.get("kernel")
    return {
        "shape": layers[0].shape.name,
        "kept_megabytes": kept / 1e6,
        "limit_us": kept / bandwidth,
        "dense_us": dense,
        "by_group_us": times["by_group"],
        "kernel_us": kernel,
        "by_group_ratio": dense / times["by_group"],
        "kernel_ratio": kernel and dense / kernel,
        "kernel_share": kernel and kept / bandwidth / kernel,
    }


@app.command()
@torch.inference_mode()
def kernel(
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every contender.")] = 100,
    device: Device = "cuda",
    tiny: Tiny = False,
    output: Output = None,
) -> None:
    """Time one token's attention in one layer: dense SDPA, SDPA by head group, one launch for all heads."""
    with said_in_a_sentence():
        where = _timing.device_of(device)
        if where.type == "cuda" and loaded_kernel() is None:
            raise InputError("the kernel needs triton, which is not installed or cannot build here")
        if where.type != "cuda" and not tiny:
            raise InputError("--device is cpu, where the kernel does not run: pass --tiny to try the program")
    dtype, layers = (torch.bfloat16, 4) if where.type == "cuda" else (torch.float32, 2)
    bandwidth = _timing.device_copy_bandwidth(min(rounds, 20), where)
    shapes = TINY_SHAPES if tiny else SHAPES
    costs = [layer_cost([Layer(shape, dtype, where) for _ in range(layers)], bandwidth, rounds) for shape in shapes]
    _timing.show(f"attention in one layer; a large copy moves {bandwidth / 1e3:,.0f} GB/s", costs)
    about = _timing.machine(where, dtype) | {"layers": layers, "copy_gb_per_s": bandwidth / 1e3}
    _timing.publish(about | {"costs": costs}, output)


# ---- Whole steps ----

PARTS = ("step", "batch", "growth")
FIRST = 3  # steps before the first turn: to compile, to capture, to replay
WARM_UP = 2  # turns that are thrown away
FULL, PLAN = "full", "plan"  # this library's cache: one that keeps all, and the plan's
STATIC, DYNAMIC, EAGER = "full, StaticCache", "full, DynamicCache eager", "plan, eager"
TURNS = ((STATIC, PLAN), (FULL, PLAN), (DYNAMIC, PLAN, EAGER))  # all at once would not fit a GPU


@dataclass(frozen=True)
class Sizes:
    """Models and sizes of every part."""

    step_model: str = "pythia-2.8b"
    step_batch: int = 32
    step_context: int = 2048
    batch_model: str = "llama-3-8b"
    batch_context: int = 8192
    cap: float = 60e9  # bytes of device memory, in which the largest batch is sought
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 32)


TINY = Sizes("tiny", 2, 80, "tiny", 64, 1.2e6, (64, 80), (1, 2))


@dataclass
class Contender:
    """`act(n)` makes n steps inside `reading()`; `kept`: bytes of K and V that a step reads."""

    act: Callable[[int], Any]
    reading: Callable[[], AbstractContextManager[Any]]
    kept: int
    decoder: GraphedDecoder | None = None


def ordinary_steps(model: PreTrainedModel, cache: Any, tokens: Tensor, count: int) -> None:
    """Greedy passes as a user writes them; `tokens` `[batch]` come first."""
    for _ in range(count):
        logits = model(tokens[:, None], past_key_values=cache, use_cache=True).logits
        tokens = logits[:, -1].argmax(-1)


def contender(
    name: str, plans: Mapping[str, RetentionPlan], model: PreTrainedModel, batch: int, context: int, new: int
) -> Contender:
    """Fill the cache of a contender so that half of the `new` steps come after `context` tokens."""
    config, start = model.config, context - new // 2
    tokens = torch.ones(batch, dtype=torch.long, device=model.device)
    own = plans[PLAN if name in (PLAN, EAGER) else FULL]
    kept = batch * _models.kept_bytes(own, config, context, model.dtype)
    reading = partial(attached, model) if name in (FULL, PLAN, EAGER) else nullcontext
    cache: Any
    if name == DYNAMIC:
        cache = fill(DynamicCache(config=config), config, batch, start, model.dtype, model.device)
    elif name == STATIC:
        cache = _models.filled_static(model, batch, start, new)
    else:
        cache = _models.filled(own, model, batch, start, new)
    if name in (DYNAMIC, EAGER):
        return Contender(partial(ordinary_steps, model, cache, tokens), reading, kept)
    decoder = GraphedDecoder(model, cache, new)
    return Contender(partial(decoder.decode, tokens), reading, kept, decoder)


@torch.no_grad()
def step_costs(
    names: Sequence[str],
    model: PreTrainedModel,
    plans: Mapping[str, RetentionPlan],
    batch: int,
    context: int,
    bandwidth: float,
    rounds: int,
    steps: int,
) -> list[dict[str, Any]]:
    """Time contenders, the full cache first, in turns of `steps` steps; one row each. `bandwidth`: bytes a second.

    Raises `InputError` if the context is shorter than the tokens that are appended, or a step was not captured.
    """
    new = FIRST + (rounds + WARM_UP) * steps
    if context <= new:
        raise InputError(f"a context of {context} tokens is shorter than the {new} that are appended")
    contenders = {name: contender(name, plans, model, batch, context, new) for name in names}
    for name, one in contenders.items():
        with one.reading():
            one.act(FIRST)
        if model.device.type == "cuda" and one.decoder is not None and not one.decoder.captured:
            raise InputError(f"the steps of {name!r} were not captured: the kernel does not serve this cache here")

    def turn(one: Contender) -> float:
        with one.reading():
            return timed(partial(one.act, steps), [model.device])[1] / steps

    times = _timing.in_turns({name: partial(turn, one) for name, one in contenders.items()}, rounds, WARM_UP)
    costs = []
    for name, one in contenders.items():
        spread = Spread.of(times[name])
        limit = 1000 * (weight_bytes(model) + one.kept) / bandwidth
        costs.append(
            {"contender": name, "batch": batch, "context": context}
            | {"captured": one.decoder is not None and one.decoder.captured}
            | {"ms": spread.median, "p10": spread.p10, "p90": spread.p90, "tokens_per_s": 1000 * batch / spread.median}
            | {"limit_ms": limit, "share_of_limit": limit / spread.median}
            | {"times_full": times_faster(times[names[0]], times[name])}
            | {"faster_than": {one: times_faster(times[one], times[name]) for one in names if one != name}}
        )
    return costs


def plans_of(model: PreTrainedModel, context: int) -> dict[str, RetentionPlan]:
    """The plan that keeps everything and the one that keeps `SHARE`."""
    return {
        FULL: plan_of(model.config, context, 1.0, 0.0),
        PLAN: plan_of(model.config, context, SHARE, FULL_HEADS),
    }


@torch.no_grad()
def fits(model: PreTrainedModel, plan: RetentionPlan, batch: int, context: int, cap: float) -> bool:
    """True if a cache of `context` tokens and decode steps fit `cap` bytes, weights and temporaries included.

    On a GPU the allocator refuses more than that; on a CPU weights and cache are added up.
    """
    device, steps = model.device, 3
    tokens = torch.ones(batch, dtype=torch.long, device=device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0), device)
    try:
        cache = _models.filled(plan, model, batch, context - steps, steps)
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
    """The largest batch that fits, by bisection over real runs; 0 if one row does not fit."""
    weights = sum(weight.nbytes for weight in model.parameters())
    low, high = 0, max(int((cap - weights) / _models.kept_bytes(plan, model.config, context, model.dtype)), 0) + 1
    while high - low > 1:
        middle = (low + high) // 2
        _models.release(model.device)
        low, high = (middle, high) if fits(model, plan, middle, context, cap) else (low, middle)
    _models.release(model.device)
    return low


def growth(model: PreTrainedModel, sizes: Sizes, bandwidth: float, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Captured steps of both plans at every context and batch that fit nine tenths of the device with both caches."""
    room, costs = float("inf"), list[dict[str, Any]]()
    if model.device.type == "cuda":
        room = 0.9 * torch.cuda.get_device_properties(model.device).total_memory
    cells = [(context, batch) for context in sizes.contexts for batch in sizes.batches]
    for context, batch in tqdm(cells, desc="growth", unit="cell"):
        plans = plans_of(model, context)
        kept = batch * sum(_models.kept_bytes(plan, model.config, context, model.dtype) for plan in plans.values())
        if weight_bytes(model) + kept < room:
            costs += step_costs((FULL, PLAN), model, plans, batch, context, bandwidth, rounds, steps)
            _models.release(model.device)
    return costs


@app.command()
def steps(
    part: Annotated[list[str], typer.Option(help="step, batch or growth (repeatable).")] = list(PARTS),  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every contender.")] = 11,
    count: Annotated[int, typer.Option("--steps", min=1, help="Steps in a turn.")] = 8,
    device: Device = "cuda",
    tiny: Tiny = False,
    output: Output = None,
) -> None:
    """Time whole decode steps and find what fits, with the full cache and with a plan that keeps a quarter of it."""
    with said_in_a_sentence():
        unknown = [name for name in part if name not in PARTS]
        if unknown:
            raise InputError(f"--part is {unknown[0]!r}, expected one of {', '.join(PARTS)}")
        where, sizes = _timing.device_of(device), TINY if tiny else Sizes()
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        bandwidth = copy_bandwidth(where)
        result = _timing.machine(where, dtype)
        result |= {"copy_gb_per_s": bandwidth / 1e9, "share": SHARE, "full_heads": FULL_HEADS}
        if "step" in part:
            name, batch, context = sizes.step_model, sizes.step_batch, sizes.step_context
            model, costs = _models.random_model(_models.config_of(name), dtype, where), []
            for names in TURNS:
                plans = plans_of(model, context)
                costs += step_costs(names, model, plans, batch, context, bandwidth, rounds, count)
                _models.release(where)
            _timing.show(name, costs)
            result["step"] = {"model": name, "costs": costs}
            del model
            _models.release(where)
        if {"batch", "growth"} & set(part):
            name, context = sizes.batch_model, sizes.batch_context
            model = _models.random_model(_models.config_of(name), dtype, where)
            if "batch" in part:
                plans, cap = plans_of(model, context), sizes.cap
                full, plan = (largest_batch(model, plans[one], context, cap) for one in (FULL, PLAN))
                result["batch"] = {"model": name, "context": context, "cap_bytes": cap, "full": full, "plan": plan}
                result["batch"] |= {"ratio": plan / max(full, 1)}
            if "growth" in part:
                costs = growth(model, sizes, bandwidth, max(rounds // 2, 1), count)
                _timing.show(name, costs)
                result["growth"] = {"model": name, "costs": costs}
    _timing.publish(result, output)


# ---- A model of your own ----


@app.command()
def model(
    folder: Annotated[Path | None, typer.Argument(help="Model folder; not with --tiny.")] = None,
    context: Annotated[list[int], typer.Option(help="Tokens of context (repeatable).")] = [64, 8000],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Rows (repeatable).")] = [1],  # noqa: B006
    share: Annotated[list[float], typer.Option(help="Share of the slots kept (repeatable).")] = [1.0, 0.25],  # noqa: B006
    plan: Annotated[list[Path], typer.Option(help="Retention plan file to time as well (repeatable).")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every contender.")] = 15,
    device: Device = "cpu",
    tiny: Tiny = False,
    output: Output = None,
) -> None:
    """Time a decode step of a model, whole and its attention alone, with compressed caches and with DynamicCache."""
    with said_in_a_sentence():
        if (folder is None) != tiny:
            raise InputError("expected a model folder, or --tiny without one")
        where = _timing.device_of(device)
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        loaded, costs = _models.model_of(folder, dtype, where), []
        for tokens in [40] if tiny else context:
            plans = {f"{part:.0%} uniform": plan_of(loaded.config, tokens, part, 0.0) for part in share}
            plans |= {file.name: RetentionPlan.load(file) for file in plan}
            for size in batch:
                costs += measure(loaded, plans, tokens, size, rounds)
    rows = [asdict(cost) for cost in costs]
    _timing.show("one decode step; ratios to DynamicCache", rows)
    about = _timing.machine(where, dtype) | {"model": folder.resolve().name if folder else "tiny"}
    _timing.publish(about | {"costs": rows}, output)


if __name__ == "__main__":
    app()
