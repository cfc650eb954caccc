"""What one token's attention over a ragged cache costs on a GPU: dense, group by group, and in one launch.

    python -m benchmarks.kernel_cost --output kernel_cost.json
    python -m benchmarks.kernel_cost --sweep --output kernel_sweep.json

Each contender attends in several layers with caches of their own, one after the other in a captured CUDA graph, as a
decode step does; so the host's part is left out and no cache is found in L2. The graphs take turns, a large buffer is
read in between, and times are medians a layer. The bandwidth limit is the time to read the kept K and V at the speed of
a large device-to-device copy in the same run. Appending the token is not part of it. `--sweep` also times the kernel
with many settings, which takes minutes of compiling, and names the best for all shapes together.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_clock import capture, clock, copy_bandwidth
from kvcompress.cache.attend import Reading, attend
from kvcompress.cache.padding import Padding
from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.ops.ragged_decode import GroupSlots, Scratch, Tuning, decode, kernel, table_of

WINDOW = 4 + 128  # slots of a head that is not full
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Shape:
    """A layer: query heads, KV heads, head size, rows of the batch, tokens, and how many KV heads hold them all."""

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


@dataclass
class Cost:
    """Medians in microseconds a layer; ratios are to dense SDPA, shares of the bandwidth limit of what is kept."""

    shape: str
    kept_megabytes: float
    limit_us: float
    dense_us: float
    by_group_us: float
    kernel_us: float
    by_group_ratio: float
    kernel_ratio: float
    kernel_share: float
    kernel_error: float


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
        self.scratch: dict[Tuning | None, Scratch] = {}  # one each: a captured graph goes on using its own

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in self.parts for tensor in (part.keys, part.values))

    def dense(self) -> Tensor:
        grouped = self.shape.query_heads != self.shape.kv_heads
        return scaled_dot_product_attention(self.query[:, :, None], self.keys, self.values, enable_gqa=grouped)

    def by_group(self) -> Tensor:
        """As the cache reads group by group."""
        query = self.query.view(self.shape.batch, self.shape.kv_heads, -1, 1, self.shape.size)
        out = torch.zeros_like(query)
        for part in self.parts:
            heads = slice(part.heads[0], part.heads[-1] + 1)
            out[:, heads] = attend(query[:, heads], part.keys, part.values, None, Reading(Padding(), None))
        return out.view_as(self.query)

    def kernel(self, tuning: Tuning | None = None) -> Tensor:
        scratch = self.scratch.get(tuning)
        out, self.scratch[tuning] = decode(
            self.query, self.table, self.shape.size, self.seen, scratch=scratch, tuning=tuning, settled=True
        )
        return out

    def kernel_error(self) -> float:
        """Norm of the difference to softmax in float32, over the norm of that."""
        found = self.kernel().view(self.shape.batch, self.shape.kv_heads, -1, self.shape.size).float()
        query = self.query.view(found.shape).float()
        difference = norm = 0.0
        for part in self.parts:
            for at, head in enumerate(part.heads):
                keys, values = part.keys[:, at].float(), part.values[:, at].float()
                scores = query[:, head] @ keys.transpose(1, 2) / math.sqrt(self.shape.size)
                expected = scores.softmax(dim=-1) @ values
                difference += float((found[:, head] - expected).square().sum())
                norm += float(expected.square().sum())
        return math.sqrt(difference / norm)


def compare(shape: Shape, layers: list[Layer], bandwidth: float, rounds: int, tuning: Tuning | None) -> Cost:
    """Time the three ways to read `layers`."""
    acts = {
        "dense": capture([layer.dense for layer in layers]),
        "by_group": capture([layer.by_group for layer in layers]),
        "kernel": capture([partial(layer.kernel, tuning) for layer in layers]),
    }
    times = clock(acts, rounds, layers[0].query.device)
    dense, by_group, at_once = (times[name] / len(layers) for name in acts)
    kept = layers[0].nbytes
    limit = kept / bandwidth
    error = layers[0].kernel_error()
    return Cost(
        shape.name,
        kept / 1e6,
        limit,
        dense,
        by_group,
        at_once,
        dense / by_group,
        dense / at_once,
        limit / at_once,
        error,
    )


def sweep(layers: list[Layer], bandwidth: float, rounds: int) -> dict[Tuning, float]:
    """Share of the bandwidth limit with each of the settings that this device can run."""
    acts, settings = {}, {}
    for block, programs, warps, stages in product((32, 64, 128), (1, 2, 3, 4), (4, 8), (2, 3, 4)):
        tuning = Tuning(block, programs, warps, stages)
        try:
            acts[str(tuning)] = capture([partial(layer.kernel, tuning) for layer in layers])
        except Exception as error:  # too little shared memory or too few registers: triton has several errors for it
            typer.echo(f"{tuning}: {str(error).splitlines()[0][:100]}", err=True)
        else:
            settings[str(tuning)] = tuning
    times = clock(acts, rounds, layers[0].query.device)
    return {settings[name]: layers[0].nbytes / bandwidth * len(layers) / time for name, time in times.items()}


def best_of_all(sweeps: list[dict[Tuning, float]]) -> Tuning:
    """The settings with the largest geometric mean of the shares, of those that every shape can run."""
    common = set(sweeps[0]).intersection(*sweeps)
    return max(common, key=lambda tuning: math.prod(shares[tuning] for shares in sweeps))


def show(costs: list[Cost], bandwidth: float) -> None:
    """Print the costs as a table."""
    table = Table("shape", "limit µs", "dense µs", "groups µs", "kernel µs", "× dense", "of limit", "error")
    for cost in costs:
        times = (cost.limit_us, cost.dense_us, cost.by_group_us, cost.kernel_us)
        shares = f"{cost.kernel_ratio:.2f}", f"{cost.kernel_share:.2f}", f"{cost.kernel_error:.1e}"
        table.add_row(cost.shape, *(f"{time:.1f}" for time in times), *shares)
    Console(width=130).print(table, f"copy: {bandwidth / 1e3:,.0f} GB/s")


@app.command()
@torch.inference_mode()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every contender.")] = 100,
    layers: Annotated[int, typer.Option(min=1, help="Layers in a graph, each with its own cache.")] = 4,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    tuning: Annotated[str, typer.Option(help="Keys a block, programs a multiprocessor, warps, stages: 64,2,4,3.")] = "",
    with_sweep: Annotated[bool, typer.Option("--sweep", help="Time the kernel with many settings as well.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file as well.")] = None,
) -> None:
    """Time one token's attention over ragged heads on a GPU: dense SDPA, SDPA group by group, one launch."""
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    numbers = [int(number) for number in tuning.split(",") if number.strip().isdigit()]
    with said_in_a_sentence():
        if kind is None:
            raise InputError(f"dtype is {dtype!r}, expected bfloat16 or float16")
        if tuning and len(numbers) != 4:
            raise InputError(f"tuning is {tuning!r}, expected four numbers such as 64,2,4,3")
        if not torch.cuda.is_available() or kernel() is None:
            raise InputError("this times a GPU kernel and found no CUDA device with triton")
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = copy_bandwidth(min(rounds, 20), device)
    costs, sweeps = [], []
    for shape in SHAPES:
        caches = [Layer(shape, kind, device) for _ in range(layers)]
        costs.append(compare(shape, caches, bandwidth, rounds, Tuning(*numbers) if numbers else None))
        if with_sweep:
            sweeps.append(sweep(caches, bandwidth, max(rounds // 4, 5)))
            for setting, share in sorted(sweeps[-1].items(), key=lambda item: -item[1])[:5]:
                typer.echo(f"{shape.name}: {share:.3f} with {setting}", err=True)
    show(costs, bandwidth)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "dtype": dtype,
        "layers": layers,
        "copy_gb_per_s": bandwidth / 1e3,
        "costs": [asdict(cost) for cost in costs],
    }
    if sweeps:
        result["best_tuning"] = asdict(best_of_all(sweeps))
        result["sweeps"] = {
            shape.name: [{**asdict(setting), "share": share} for setting, share in shares.items()]
            for shape, shares in zip(SHAPES, sweeps, strict=True)
        }
        typer.echo(f"best for all: {best_of_all(sweeps)}", err=True)
    if output is None:
        typer.echo(json.dumps(result))
    else:
        write_json(output, result)


if __name__ == "__main__":
    app()
