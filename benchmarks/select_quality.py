"""How well each score chooses: uniform `select` plans of every score beside sink + window of the same bytes.

    python -m benchmarks.select_quality --share 0.5 --share 0.25 --output select_quality.json
    python -m benchmarks.select_quality --sensitivity data/head_sensitivity.safetensors --policy select

Plans of `allocate`'s policies compete where prices are given. Processes that torchrun started share the work.

A context is read in one exact pass by the contender's own cache, without what comes after it, and compressed once. Then
either a continuation is scored (`score_continuation`) or a question about the context is asked (`retrieve`). A share is
that of the context's tokens; all contenders hold that much throughout. A cache that grows with the continuation holds, on
average, half of it more: `--growing` gives that to all, so that bytes are those of peers whose caches grow.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from benchmarks.select_contenders import policy_contenders, select_contenders
from kvcompress.cache.layer import Prefill
from kvcompress.core.artifacts import read_model, write_json
from kvcompress.core.errors import InputError, said_in_a_sentence
from kvcompress.evaluation.compare import retrieval_rows, rival_row, rounded, text_rows
from kvcompress.evaluation.contenders import FULL_CACHE, Contender
from kvcompress.evaluation.environment import environment
from kvcompress.evaluation.intervals import paired_difference
from kvcompress.evaluation.perplexity import Documents, score_continuation
from kvcompress.evaluation.retrieval import retrieve
from kvcompress.models import distributed
from kvcompress.models.load import load_folder
from kvcompress.models.params import ModelParams, source_of
from kvcompress.models.sources import ModelRecord, locate_model
from kvcompress.planning.params import BudgetParams
from kvcompress.planning.policies import Planner
from kvcompress.reporting.tables import change
from kvcompress.scores.registry import SCORES
from kvcompress.scores.selection_rule import SelectionRule
from kvcompress.sensitivity.prices import Sensitivity
from kvcompress.texts.corpora import documents_of_all, load_texts
from kvcompress.texts.retrieval_tasks import TASKS, Case, Task, Use, make_cases

STREAMED = 1024  # tokens a pass, where contexts stream in
app = typer.Typer(add_completion=False)


def select_rows(
    model: PreTrainedModel,
    batch: Documents,
    cases: Sequence[Case],
    contenders: Mapping[str, Contender],
    context: int,
    asked: Mapping[str, Contender] | None = None,
    chunk_size: int = 64,
    prefill: Prefill = "exact",
) -> list[dict[str, Any]]:
    """One row a contender: bytes over the continuation, its perplexity by text and pooled, facts found, the rival.

    `mean_share` is that of the mean bytes over the run, after the context and every `chunk_size` tokens after it, in the
    full cache's. `nll_over` is the difference to everyone else of the same bytes, nats a token, with an interval.
    `contenders` have the full cache among them. `asked` are who has their names in the retrieval, where contexts of
    another length make other sizes of the same share; None for the same. `prefill`: how contexts with facts are read.
    """
    compressors, asking = (
        {name: contender.compressor for name, contender in found.items()} for found in (contenders, asked or contenders)
    )
    scores = score_continuation(model, batch, compressors, context, chunk_size)
    found = retrieve(model, cases, asking, prefill, STREAMED)
    rows = []
    for name, contender in contenders.items():
        score, full = scores[name], scores[FULL_CACHE]
        row: dict[str, Any] = {
            "name": name,
            "family": contender.family,
            "share": round(score.nbytes_end / full.nbytes_end, 6),
            "mean_share": round(score.nbytes_mean / full.nbytes_mean, 6),
            "nbytes_end": score.nbytes_end,
            "nbytes_mean": round(score.nbytes_mean),
            "tokens": score.nll.size,
            "perplexity": round(score.perplexity(), 4),
            "perplexity_gmean": round(score.geometric_mean(), 4),
            "texts": text_rows(score),
            "nll_over_full": rounded(paired_difference(score.nll, full.nll)),
            "seconds": round(score.seconds, 2),
        }
        if contender.rival:
            row["rival"] = rival_row(score, contender.rival, scores[contender.rival])
            row["nll_over"] = {
                other.name: rounded(paired_difference(score.nll, scores[other.name].nll))
                for other in contenders.values()
                if contender.rival in (other.name, other.rival) and other.name != name
            }
        rows.append(row | {"retrieval": retrieval_rows(cases, found[name])})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown; facts with Wilson intervals of the share."""
    tasks, texts = list(rows[0]["retrieval"]), list(rows[0]["texts"])
    header = ["contender", "bytes at the end", "mean", "geometric mean", *texts, "÷ uniform's", "ΔNLL to full"]
    header += [f"{task} of {rows[0]['retrieval'][task]['total']}" for task in tasks]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for row in rows:
        cells = [row["name"], f"{row['share']:.1%}", f"{row['mean_share']:.1%}", f"{row['perplexity_gmean']:.2f}"]
        cells += [f"{row['texts'][text]['perplexity']:.2f}" for text in texts]
        cells.append(f"{row['rival']['gmean_ratio']:.3f}" if "rival" in row else "")
        cells.append(change(row["nll_over_full"]))
        for task in tasks:
            facts = row["retrieval"][task]
            cells.append(f"{facts['correct']} ({facts['low']:.2f} … {facts['high']:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_plans(contenders: Iterable[Contender], folder: Path, use: str) -> None:
    """Write the plans of contenders by their names, and what they serve."""
    for contender in contenders:
        if contender.plan:
            label = contender.name.replace("%", "").replace(", ", "-").replace(" ", "-")
            contender.plan.save(folder / f"{label}-{use}.json")


@app.command()
def main(
    model: Annotated[str, typer.Option(help="A model folder, or a name on the hub.")] = "data/model",
    corpus: Annotated[Path, typer.Option(help="Folder of texts, as `prepare` leaves it.")] = Path("data/corpus"),
    calibration: Annotated[bool, typer.Option("--calibration", help="Judge on the texts that calibrate.")] = False,
    share: Annotated[list[float], typer.Option(help="Share of the context held (repeatable).")] = [0.25],  # noqa: B006
    score: Annotated[list[str], typer.Option(help="Scores (repeatable) [default: all].")] = [],  # noqa: B006
    adaptive: Annotated[
        list[str],
        typer.Option(help="Scores whose keys are also divided among a layer's heads by the prompt (repeatable)."),
    ] = [],  # noqa: B006
    sensitivity: Annotated[Path | None, typer.Option(help="Prices of heads, to make plans from.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Policies of plans from prices [default: select].")] = None,
    context: Annotated[int, typer.Option(min=64, help="Tokens of the exact prefill.")] = 1536,
    continuation: Annotated[int, typer.Option(min=2, help="Tokens after it.")] = 512,
    documents_per_text: Annotated[int, typer.Option(min=1, help="Documents of each text.")] = 6,
    retrieval_length: Annotated[int, typer.Option(min=64, help="Tokens that hide a fact.")] = 2000,
    retrieval_depths: Annotated[int, typer.Option(min=1, help="Places of the fact.")] = 20,
    retrieval_per_depth: Annotated[int, typer.Option(min=1, help="Facts of each task at every place.")] = 1,
    retrieval_seed: Annotated[int, typer.Option(min=0, help="Another number, other facts.")] = 0,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Contexts with facts stream in, instead of one exact pass.")
    ] = False,
    task: Annotated[list[str] | None, typer.Option(help="Kinds of facts [default: all].")] = None,
    sinks: Annotated[int, typer.Option(min=0, help="Sinks of every head.")] = 4,
    recent: Annotated[float, typer.Option(help="Part of the other slots that is a window.")] = 0.5,
    window: Annotated[list[int], typer.Option(help="Also with a window of so many keys (repeatable).")] = [],  # noqa: B006
    balance: Annotated[
        float, typer.Option(min=0, help="Nats a token that far questions are worth.")
    ] = BudgetParams().balance,
    early: Annotated[
        list[float] | None,
        typer.Option(min=1, help="How much select favours early layers (repeatable) [default: the library's]."),
    ] = None,
    growing: Annotated[
        bool, typer.Option("--growing", help="Half of the continuation more, as a growing cache.")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="Tokens between two choices.")] = SelectionRule.every,
    observe: Annotated[
        int, typer.Option(min=1, help="Last queries that a later choice goes by.")
    ] = SelectionRule.observe,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    plans: Annotated[Path | None, typer.Option(help="Also write the plans of policies into this folder.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the whole result to this JSON file.")] = None,
) -> None:
    """Perplexity of a continuation and facts found after an exact prefill, for every score at equal bytes."""
    with said_in_a_sentence():
        compared = score or list(SCORES)
        for option, given, known in (
            ("--score", score, SCORES),
            ("--adaptive", adaptive, compared),
            ("--task", task or TASKS, TASKS),
        ):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise InputError(f"{option} is {unknown[0]!r}, expected one of {', '.join(known)}")
        distributed.join()
        params = ModelParams.model_validate({"device": device, "dtype": dtype, **source_of(model, "main", "--model")})
        record, folder = locate_model(params)
        loaded, tokenizer = load_folder(folder, params)
        named = Path(model).parent / "model.json"  # as `prepare` leaves it beside the folder
        name = read_model(named, ModelRecord).id if named.is_file() else record.id
        texts = load_texts(corpus, "calibration" if calibration else "evaluation")
        batch = documents_of_all(tokenizer, texts, context + continuation, documents_per_text)
        use: Use = "calibration" if calibration else "evaluation"
        policies, favours = policy or ["select"], early or [BudgetParams().early]
        asked: list[Task] = [name for name in TASKS if name in (task or TASKS)]
        cases = make_cases(
            tokenizer, texts, [retrieval_length], retrieval_depths, retrieval_per_depth, retrieval_seed, use, asked
        )
        prefill: Prefill = "streaming" if streaming else "exact"
        settings = {
            "shares": share,
            "sinks": sinks,
            "recent": recent,
            "windows": window,
            "adaptive": adaptive,
            "every": every,
            "observe": observe,
            "context": context,
            "continuation": continuation,
            "documents_per_text": documents_per_text,
            "growing": growing,
            "calibration": calibration,
            "policies": policies if sensitivity else [],
            "balance": balance,
            "early": favours[0] if len(favours) == 1 else favours,
            "retrieval_length": retrieval_length,
            "retrieval_depths": retrieval_depths,
            "retrieval_per_depth": retrieval_per_depth,
            "retrieval_seed": retrieval_seed,
            "retrieval_prefill": prefill,
            "tasks": asked,
        }
        choosing, prices = SelectionRule(every, observe), Sensitivity.load(sensitivity) if sensitivity else None

        def compete(tokens: int, end: int, more: int) -> dict[str, Contender]:
            found = select_contenders(
                loaded.config, share, tokens, sinks, recent, compared, choosing, more, window, adaptive
            )
            if prices:
                for favour in favours:
                    planner = Planner(prices, name, record.head_dim, 4, end, balance, choosing=choosing, early=favour)
                    label = "" if len(favours) == 1 else f", early {favour:g}"
                    found |= policy_contenders(planner, policies, share, tokens, choosing, more, label)
            return found

        contenders = compete(context, context + continuation, continuation // 2 if growing else 0)
        asking = compete(retrieval_length, retrieval_length, 0)
        rows = select_rows(loaded, batch, cases, contenders, context, asking, prefill=prefill)
        if not distributed.leave():  # every process has all, one writes it
            return
    print(table(rows))
    if plans:
        for use_of, found in (("text", contenders), ("facts", asking)):
            save_plans([one for one in found.values() if one.family in policies], plans, use_of)
    where = {"model": name, "texts": list(texts), "environment": environment(loaded)}
    result = where | {"settings": settings, "rows": rows}
    if output is None:
        typer.echo(json.dumps(result))
    else:
        write_json(output, result)


if __name__ == "__main__":
    app()
