"""`kvcompress show FILE`: a head map of classes, statistics, prices or a plan in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.cli.options import AsJson, print_json
from kvcompress.core.errors import InputError

FIELDS = ("mean_entropy", "normalized_entropy", "sink_ratio", "local_ratio", "max_attention_mean", "induction_score")


def show(
    file: Annotated[Path, typer.Argument(help="Classes, statistics, a plan (JSON), or sensitivity (safetensors).")],
    field: Annotated[
        str, typer.Option(help="Of statistics: mean_entropy, sink_ratio, local_ratio ...")
    ] = "mean_entropy",
    window: Annotated[int, typer.Option(min=1, help="Of sensitivity: the window whose price is shown.")] = 128,
    context: Annotated[int, typer.Option(min=1, help="Of a plan: tokens after which slots are counted.")] = 2048,
    as_json: AsJson = False,
) -> None:
    """Show what a file says of every head.

    Example: `kvcompress show plan.json --context 8192`
    """
    from kvcompress.cli.head_map import class_map, number_map, plan_map
    from kvcompress.core.artifacts import read_json

    if file.suffix == ".safetensors":
        show_prices(file, window, as_json)
        return
    content = read_json(file)
    if as_json:
        print_json(content)
        return
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no classes, statistics or plan")
    if "classifications" in content:
        from kvcompress.core.head_classes import load_classifications

        class_map(load_classifications(file))
    elif "head_statistics" in content:
        from kvcompress.core.head_statistics import load_statistics

        if field not in FIELDS:
            raise InputError(f"--field is {field!r}, expected one of {', '.join(FIELDS)}")
        statistics = load_statistics(file)
        width = statistics.model_info.num_heads
        values = [getattr(head, field) or 0.0 for head in statistics.head_statistics]
        number_map([values[i : i + width] for i in range(0, len(values), width)], field)
    elif "heads" in content:
        from kvcompress.core.plan import RetentionPlan

        plan_map(RetentionPlan.load(file), context)
    else:
        raise InputError(f"{file} holds no classes, statistics or plan")


def show_prices(file: Path, window: int, as_json: bool) -> None:
    """Print the price of one window, and the share of answers about far facts, of every KV head."""
    from kvcompress.cli.head_map import number_map
    from kvcompress.sensitivity.prices import Sensitivity

    found = Sensitivity.load(file)
    if window not in found.windows:
        raise InputError(f"--window is {window}, {file} knows {', '.join(map(str, found.windows))}")
    price, carried = 1000 * found.prices()[found.windows.index(window)], found.retrieval.mean(0)
    if as_json:
        print_json({"window": window, "price": price.tolist(), "facts": carried.tolist(), "origin": found.origin})
        return
    number_map(price, f"price of {found.sinks} + {window} keys, 1/1000 nat a token")
    number_map(carried, "far facts carried, nats a token of the answer")
