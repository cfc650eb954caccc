"""`kvcompress plan MODEL --budget 25%`: price the heads, keep the prices, and spend a budget on them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcompress.cli.options import AsJson, Documents, ModelOptions, Texts, print_json, read_texts, share_of
from kvcompress.core.errors import InputError
from kvcompress.core.outputs import is_stream
from kvcompress.planning.params import BudgetParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvcompress.sensitivity.prices import Sensitivity


BALANCE, EARLY = (BudgetParams.model_fields[name].default for name in ("balance", "early"))


def require_possible(policy: str, classifications: Path | None) -> None:
    """Raise `InputError` for an unknown policy, or if a classification file is needed and missing."""
    from kvcompress.planning.policies import POLICIES

    if policy not in POLICIES:
        raise InputError(f"--policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if policy.startswith("class_table") and (classifications is None or not classifications.is_file()):
        raise InputError(f"--policy {policy} needs --classifications, a file of classes, found {classifications}")


def require_heeded(policy: str, balance: float | None, early: float | None, budget: list[str] | None) -> None:
    """Raise `InputError` for an option that this policy ignores."""
    from kvcompress.planning.policies import WITHOUT_BUDGET, WITHOUT_PRICES

    if early is not None and policy != "select":
        raise InputError(f"--early is for --policy select alone, found --policy {policy}")
    if balance is not None and policy in WITHOUT_PRICES:
        raise InputError(f"--balance weighs prices, which --policy {policy} does not look at")
    if budget and policy in WITHOUT_BUDGET:
        raise InputError(f"--policy {policy} keeps what the table says, whatever --budget: leave it out")


def prices_beside(output: Path, plans: int) -> Path:
    """Return the default file of prices: next to the plan, or in the folder of several plans.

    A device has no such place: its prices go to the current folder.
    """
    if is_stream(output):
        return Path("plan-prices.safetensors")
    return output.with_name(f"{output.stem}-prices.safetensors") if plans == 1 else output / "prices.safetensors"


def unpriced(model: "PreTrainedModel") -> "Sensitivity":
    """Return prices without any value, for a policy that needs only the number of heads."""
    import numpy as np

    from kvcompress.models.architecture import Architecture
    from kvcompress.sensitivity.params import SensitivityParams
    from kvcompress.sensitivity.prices import Sensitivity

    shape = Architecture.of_config(model.config)
    nothing = np.zeros((0, shape.num_layers, shape.num_key_value_heads))
    origin = {"num_attention_heads": shape.num_attention_heads}
    return Sensitivity([], SensitivityParams().sinks, 0, 0, 0, nothing, nothing, nothing, origin, [], nothing, nothing)


def plan(
    options: ModelOptions,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="25%, '512 tokens' for each KV head, or '40 MB' (repeatable) [default: 25%]."),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="priced, select, retrieval_heads, uniform, class_table, class_table_scaled ...")
    ] = "priced",
    text: Texts = None,
    context: Annotated[int, typer.Option(min=64, help="Tokens of context at which the budget is counted.")] = 2048,
    balance: Annotated[
        float | None,
        typer.Option(min=0, help=f"Nats a token that far questions are worth [default: {BALANCE:g}; 0: text alone]."),
    ] = None,
    early: Annotated[
        float | None,
        typer.Option(
            min=1, help=f"Of select: how much early layers get beyond price [default: {EARLY:g}; 1: nothing]."
        ),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            help="Prices of the heads: read where the file exists, else measured and written to it "
            "[default: measured, and written next to the plan]."
        ),
    ] = None,
    classifications: Annotated[Path | None, typer.Option(help="Classes, for the class table's policies.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file; a folder for several.")] = Path(
        "plan.json"
    ),
    max_tokens: Annotated[int, typer.Option(min=64, help="Tokens of each document that heads are priced on.")] = 2048,
    documents_per_text: Documents = 2,
    facts_per_context: Annotated[int, typer.Option(min=1, help="Facts in each text that is asked about.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Make a retention plan: what every KV head may keep.

    Heads are priced first: ten minutes or more for a small model on two cores, as many times longer as the model is
    larger. The prices are written before the plan is made, here to plan-prices.safetensors.
    The policies uniform, class_table and class_table_scaled need no prices.

    Example: `kvcompress plan HuggingFaceTB/SmolLM2-135M --budget 25% --text book.txt -o plan.json`

    Another plan from the same prices, at once:
    `kvcompress plan HuggingFaceTB/SmolLM2-135M --budget 10% --sensitivity plan-prices.safetensors -o small.json`
    """
    from kvcompress.planning.budget import Budget
    from kvcompress.planning.policies import WITHOUT_PRICES

    amounts = [Budget.parse(one) for one in budget or ["25%"]]
    require_possible(policy, classifications)  # heads are priced for minutes before a plan is made
    require_heeded(policy, balance, early, budget)
    places = [output] if len(amounts) == 1 else [output / f"{policy}-{amount.label}.json" for amount in amounts]
    priced = sensitivity is not None and sensitivity.is_file()
    prices = sensitivity or (None if policy in WITHOUT_PRICES else prices_beside(output, len(amounts)))
    read = {"sensitivity": sensitivity if priced else None, "classifications": classifications}
    options.check([*dict.fromkeys(places), None if priced else prices], text=text, **read)

    from kvcompress.cli.head_map import plan_map
    from kvcompress.core.params import override
    from kvcompress.models import distributed
    from kvcompress.planning import make_plan
    from kvcompress.sensitivity.measure import measure_sensitivity
    from kvcompress.sensitivity.params import SensitivityParams
    from kvcompress.sensitivity.prices import Sensitivity

    loaded, tokenizer, record = options.open()
    if sensitivity and priced:
        found = Sensitivity.load(sensitivity)
        found.require_model(record.id, record.revision, sensitivity)
    elif policy in WITHOUT_PRICES and not sensitivity:
        found = unpriced(loaded)
    else:
        settings = override(
            SensitivityParams(),
            max_tokens=max_tokens,
            documents_per_text=documents_per_text,
            facts_per_context=facts_per_context,
        )
        found = measure_sensitivity(loaded, tokenizer, read_texts(text), settings, progress=not as_json)
        found.origin |= {"model_id": record.id, "revision": record.revision, "dtype": options.dtype}
    if not distributed.leave():  # every process has the prices, one goes on
        return
    if prices and not priced:
        found.save(prices)
        if not as_json:
            print(f"prices are in {prices}; with --sensitivity {prices} the next plan needs no measuring", flush=True)
    rows = []
    for amount, place in zip(amounts, places, strict=True):
        made = make_plan(loaded, tokenizer, (), amount, policy, context, balance, classifications, found, early=early)
        made.save(place)
        size, share = made.nbytes(context, record.head_dim, loaded.dtype.itemsize), share_of(made, context)
        whole = size * share / made.share(context)
        row = {"file": str(place), "sensitivity": prices and str(prices), "share": share, "bytes": round(whole)}
        rows.append(row | made.made_from)
        if not as_json:
            plan_map(made, context)
            queries = f", {(whole - size) / 1e6:.2f} MB of it queries to choose by" if whole > size else ""
            print(f"{place}: {share:.2%} of the full cache, {whole / 1e6:.2f} MB at {context} tokens{queries}")
    if as_json:
        print_json(rows)
