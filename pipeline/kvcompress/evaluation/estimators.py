"""Do cheap prices rank heads as the expensive one does, and do they buy as good a plan?

Run: python -m kvcompress.evaluation.estimators data

The expensive price of a head's window is its definition: the divergence of the model's output when that head alone keeps
sinks and window, one forward pass for every head and window. The cheap ones are compared with it on the same calibration
documents by Spearman's rank correlation over heads, and by the divergence that a plan made from them causes on other
calibration documents. Evaluation text is not touched.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvcompress.analysis.joint_price import joint_prices
from kvcompress.analysis.listen import listening
from kvcompress.analysis.observe import require_observable
from kvcompress.analysis.sensitivity import Sensitivity
from kvcompress.analysis.text_price import text_prices
from kvcompress.analysis.window_changes import window_changes
from kvcompress.artifacts import read_model, write_json
from kvcompress.cache.oracle import judged
from kvcompress.corpora import documents, load_texts
from kvcompress.errors import said_in_a_sentence
from kvcompress.evaluation.environment import environment
from kvcompress.models import ModelRecord, input_device, load_model
from kvcompress.params.base import load_section
from kvcompress.params.model import ModelParams
from kvcompress.planning.policies import evenly, retention
from kvcompress.planning.spending import pieces, spend

Shape = tuple[int, int]
Prices = np.ndarray  # [window, layer, kv_head]


class OneHead:
    """A listener that gives one KV head its windowed output."""

    def __init__(self, layer: int, kv_head: int, window: int, sinks: int) -> None:
        self.layer, self.kv_head, self.window, self.sinks = layer, kv_head, window, sinks

    def heard(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scaling: float, limit: int | None
    ) -> Tensor:
        if layer != self.layer:
            return output
        one, group = slice(self.kv_head, self.kv_head + 1), query.shape[1] // key.shape[1]
        mine = query[0].unflatten(0, (-1, group))[one]
        changes, _ = window_changes(mine, key[0, one], value[0, one], [self.window], self.sinks, scaling, limit)
        moved = output.clone()
        moved[0, :, self.kv_head * group : (self.kv_head + 1) * group] += changes[0, 0].transpose(0, 1).to(output.dtype)
        return moved


class OutputErrors:
    """A listener that adds up how far every head's output moves: squared change over the layer's squared output."""

    def __init__(self, windows: list[int], sinks: int, shape: Shape) -> None:
        self.windows, self.sinks = windows, sinks
        self.found = torch.zeros(len(windows), *shape, dtype=torch.float64)

    def heard(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor, scaling: float, limit: int | None
    ) -> Tensor:
        grouped = query[0].unflatten(0, (key.shape[1], -1))
        changes, full = window_changes(grouped, key[0], value[0], self.windows, self.sinks, scaling, limit)
        self.found[:, layer] += (changes.square().sum((2, 3, 4)) / full.square().sum()).double().cpu()
        return output


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """`[token, vocabulary]`, float32."""
    return model(tokens[None].to(input_device(model)), use_cache=False).logits[0].float().log_softmax(-1)


def divergence(full: Tensor, moved: Tensor) -> float:
    """KL(full || moved), nats a token."""
    return float((full.exp() * (full - moved)).sum(-1).mean())


def direct(model: PreTrainedModel, tokens: Tensor, windows: list[int], sinks: int, shape: Shape) -> Prices:
    """The definition: one pass for every head and window, nats a token."""
    full, found = log_probabilities(model, tokens), np.zeros((len(windows), *shape))
    for place in tqdm(list(np.ndindex(found.shape)), desc="one head at a time", unit="pass"):
        with listening(model, OneHead(place[1], place[2], windows[place[0]], sinks)):
            found[place] = divergence(full, log_probabilities(model, tokens))
    return found


def fisher(model: PreTrainedModel, tokens: Tensor, windows: list[int], sinks: int, shape: Shape) -> Prices:
    return text_prices(model, tokens, windows, sinks, shape, 0).numpy() / len(tokens)


def joint(model: PreTrainedModel, tokens: Tensor, windows: list[int], sinks: int, shape: Shape) -> Prices:
    found = [joint_prices(model, tokens, window, sinks, shape).numpy() for window in windows]
    return np.stack(found) / len(tokens)


def output_error(model: PreTrainedModel, tokens: Tensor, windows: list[int], sinks: int, shape: Shape) -> Prices:
    errors = OutputErrors(windows, sinks, shape)
    with listening(model, errors):
        log_probabilities(model, tokens)
    return errors.found.numpy()


MEASURED: dict[str, Callable[..., Prices]] = {
    "direct": direct,
    "fisher": fisher,
    "joint": joint,
    "output error": output_error,
}


def derived(found: dict[str, Prices], windows: list[int], sinks: int, context: int) -> dict[str, Prices]:
    """Prices made of the measured ones: the layer's rate times output error, and what the pipeline goes by."""
    facts = np.zeros((1, *found["fisher"].shape[1:]))
    own = Sensitivity(
        windows, sinks, context, 1, 1, found["fisher"], found["joint"], facts, {}, [], facts[:0], facts[None, :0]
    )
    rate = found["joint"].clip(0).sum((0, 2)) / found["output error"].sum((0, 2))
    return {
        "output error x layer's rate": found["output error"] * rate[None, :, None],
        "fisher x layer's rate": own.prices(),
    }


def plan_for(
    prices: Prices | None, windows: list[int], sinks: int, context: int, share: float, heads: int
) -> np.ndarray:
    """Slots of every head, flat: `share` of the full cache spent by price, or evenly."""
    slots = int(share * heads * context)
    if prices is None:
        return evenly(slots, heads)
    sizes = np.append(np.array(windows) + sinks, context)
    curves = np.vstack([np.maximum.accumulate(prices.reshape(len(windows), -1)[::-1], 0)[::-1], np.zeros(heads)])
    return spend(pieces(sizes, curves), heads, min(int(sizes[0]), slots // heads), context, slots)


def plan_cost(model: PreTrainedModel, batch: list[Tensor], held: np.ndarray, sinks: int, shape: Shape) -> float:
    """Divergence that a plan causes on documents, nats a token, by the mask oracle."""
    kept = [retention(int(slots), len(batch[0]), sinks) for slots in held]
    layers = [kept[i : i + shape[1]] for i in range(0, len(kept), shape[1])]
    costs = []
    for tokens in batch:
        full = log_probabilities(model, tokens)
        with judged(model, layers):
            costs.append(divergence(full, log_probabilities(model, tokens)))
    return float(np.mean(costs))


def main(
    data: Annotated[Path, typer.Argument(help="The pipeline's data folder, with the model and the corpus.")],
    params: Annotated[Path, typer.Option(help="Parameters, of which the section model is read.")] = Path("params.yaml"),
    tokens: Annotated[int, typer.Option(help="Of every document.")] = 512,
    window: Annotated[list[int], typer.Option(help="Windows to price (repeatable).")] = [16, 64, 256],  # noqa: B006
    share: Annotated[list[float], typer.Option(help="Budgets of the plans.")] = [0.125, 0.25, 0.5],  # noqa: B006
    sinks: Annotated[int, typer.Option(help="First tokens that every head keeps.")] = 4,
    others: Annotated[int, typer.Option(help="Documents of every text that plans are tried on.")] = 4,
    output: Annotated[Path | None, typer.Option(help="Also write the results as JSON.")] = None,
) -> None:
    """Rank correlation with the expensive price, quality of the plans, and seconds, of every estimator."""
    model, tokenizer = load_model(read_model(data / "model.json", ModelRecord), load_section(ModelParams, params))
    observed = require_observable(model)
    shape, windows = (observed.num_layers, observed.num_key_value_heads), sorted(window)
    priced: list[Tensor] = []
    tried: list[Tensor] = []
    for name, text in load_texts(data / "corpus", "calibration").items():
        first, *rest = documents(tokenizer, name, text, tokens, 1 + others)
        priced.append(first)
        tried += rest
    found, seconds = {}, {}
    for name, measure in MEASURED.items():
        start = time.perf_counter()
        found[name] = np.mean([measure(model, one, windows, sinks, shape) for one in priced], axis=0)
        seconds[name] = (time.perf_counter() - start) / len(priced)
    found |= derived(found, windows, sinks, tokens)
    seconds["output error x layer's rate"] = seconds["output error"] + seconds["joint"]
    seconds["fisher x layer's rate"] = seconds["fisher"] + seconds["joint"]
    rows: list[dict[str, Any]] = []
    for title, prices in [("uniform", None), *found.items()]:
        row: dict[str, Any] = {"estimator": title}
        if prices is not None:
            row["seconds_a_document"] = round(seconds[title], 2)
            ranks = [spearmanr(prices[i].ravel(), found["direct"][i].ravel()).statistic for i in range(len(windows))]
            row["rank_correlation"] = {str(windows[i]): round(float(rank), 3) for i, rank in enumerate(ranks)}
        row["plan_divergence"] = {}
        for part in share:
            held = plan_for(prices, windows, sinks, tokens, part, shape[0] * shape[1])
            row["plan_divergence"][f"{part:.1%}"] = round(plan_cost(model, tried, held, sinks, shape), 5)
        rows.append(row)
    table = Table("estimator", "seconds", *(f"rank, {one}" for one in windows), *(f"KL at {one:.1%}" for one in share))
    for row in rows:
        ranked = [str(rank) for rank in row.get("rank_correlation", {}).values()] or [""] * len(windows)
        table.add_row(
            row["estimator"],
            str(row.get("seconds_a_document", "")),
            *ranked,
            *map(str, row["plan_divergence"].values()),
        )
    Console(width=120).print(table)
    settings = {"tokens": tokens, "windows": windows, "sinks": sinks, "priced": len(priced), "tried": len(tried)}
    if output:
        write_json(output, {"environment": environment(model), "settings": settings, "rows": rows})


if __name__ == "__main__":
    with said_in_a_sentence():
        typer.run(main)
