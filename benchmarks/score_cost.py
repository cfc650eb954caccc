"""What ranking the keys of one layer costs, score by score, in milliseconds and beside the layer's own attention.

    python -m benchmarks.score_cost --keys 1024 --keys 8192

Two moments are timed: the end of an exact prefill, with the queries of the whole prompt, and a step of a stream, where a
chunk of queries meets as many held keys, with holes between their positions. Vectors are random, because the time does
not depend on them. `attention` is torch's own causal attention of the same queries, what the prefill costs without any
score. Scores take turns, so that a busy machine slows all of them.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.evaluation.timing import timed
from kvcompress.models.rotary import Rotation
from kvcompress.scores.inputs import ScoreInputs
from kvcompress.scores.registry import SCORES, make_score
from kvcompress.scores.topk import best

ATTENTION = "attention"
app = typer.Typer(add_completion=False)


@dataclass
class Cost:
    """Median milliseconds of one score on one layer."""

    score: str
    keys: int
    queries: int
    moment: str
    ms: float


def held_keys(keys: int, queries: int, heads: tuple[int, int], size: int, device: torch.device) -> ScoreInputs:
    """Random vectors: `keys` keys at every second position and `queries` at the end, or a prompt where both are equal."""
    query_heads, kv_heads = heads
    generator = torch.Generator().manual_seed(0)

    def vectors(of: int, count: int) -> torch.Tensor:
        return torch.randn(1, of, count, size, generator=generator).to(device)

    positions = torch.arange(keys, device=device)
    if queries < keys:
        older = keys - queries
        positions = torch.cat((positions[:older] * 2, positions[:queries] + 2 * older))
    return ScoreInputs(
        vectors(kv_heads, keys),
        vectors(kv_heads, keys),
        positions[None, None],
        size**-0.5,
        vectors(query_heads, queries),
        positions[None, -queries:],
        Rotation(size, 10000.0),
    )


def act(name: str, held: ScoreInputs, kept: int) -> Any:
    """Score the keys and choose some, as `select` would; or attend."""
    if name != ATTENTION:
        return best(make_score(name)(held), kept)
    assert held.queries is not None
    return scaled_dot_product_attention(held.queries, held.keys, held.values, is_causal=True, enable_gqa=True)


def measure(held: ScoreInputs, moment: str, rounds: int) -> list[Cost]:
    """Time every score in turns, `rounds` times each after one round that is thrown away."""
    assert held.queries is not None
    keys, queries = held.keys.shape[2], held.queries.shape[2]
    names = [*SCORES, ATTENTION] if queries == keys else list(SCORES)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name in names:
            # A fresh copy, because a `ScoreInputs` remembers what was derived from it.
            times[name].append(timed(partial(act, name, replace(held), keys // 4), [held.keys.device])[1])
    return [Cost(name, keys, queries, moment, median(spent[1:])) for name, spent in times.items()]


def show(costs: list[Cost]) -> None:
    """Print a table with a row for each score and a column for each size."""
    columns = list(dict.fromkeys((cost.moment, cost.keys) for cost in costs))
    table = Table("score, ms a layer", *(f"{moment} {keys}" for moment, keys in columns))
    for name in dict.fromkeys(cost.score for cost in costs):
        found = {(cost.moment, cost.keys): f"{cost.ms:.1f}" for cost in costs if cost.score == name}
        table.add_row(name, *(found.get(column, "") for column in columns))
    Console(width=140).print(table)


@app.command()
def main(
    keys: Annotated[list[int], typer.Option(min=2, help="Keys held (repeatable).")] = [1024, 2048, 4096, 8192],  # noqa: B006
    chunk: Annotated[int, typer.Option(min=1, help="Queries in a chunk of a stream.")] = 256,
    query_heads: Annotated[int, typer.Option(min=1, help="Query heads of the layer.")] = 9,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads of the layer.")] = 3,
    head_dim: Annotated[int, typer.Option(min=2, help="Dimensions of a head.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every score.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file as well.")] = None,
) -> None:
    """Time every score on one layer, at the end of a prefill and on a chunk of a stream."""
    with said_in_a_sentence():
        if query_heads % kv_heads or head_dim % 2:
            raise InputError(f"{query_heads} query heads on {kv_heads} KV heads of size {head_dim} do not make a layer")
        where, heads = torch.device(device), (query_heads, kv_heads)
        costs: list[Cost] = []
        for count in keys:
            costs += measure(held_keys(count, count, heads, head_dim, where), "prefill", rounds)
            if chunk < count:
                costs += measure(held_keys(count, chunk, heads, head_dim, where), "stream", rounds)
    show(costs)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "costs": [asdict(cost) for cost in costs]}
    if output is None:
        typer.echo(json.dumps(result))
    else:
        write_json(output, result)


if __name__ == "__main__":
    app()
