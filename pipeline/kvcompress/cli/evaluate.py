"""`kvcompress evaluate MODEL --plan plan.json --text FILE`: quality of plans and of uniform caches of the same bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.cli.options import AsJson, Documents, ModelOptions, Output, print_json, read_texts, warn_of

if TYPE_CHECKING:
    from rich.console import Console


def show_rows(result: Mapping[str, Any], console: "Console") -> None:
    """Print one line a cache, and in words which wins at equal bytes."""
    from rich.table import Table

    from kvcompress.reporting.comparison import conclusion, origin

    rows = result["rows"]
    table = Table("cache", "bytes", "perplexity", "KL", *rows[0]["retrieval"])
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        found = [f"{of['correct']}/{of['total']}" for of in row["retrieval"].values()]
        table.add_row(row["name"], f"{row['share']:.1%}", f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", *found)
    console.print(origin(result), table, sep="\n\n", highlight=False)
    for sentence in filter(None, map(conclusion, rows)):
        console.print(f"\n{sentence}", highlight=False)


def evaluate(
    options: ModelOptions,
    plan: Annotated[list[Path], typer.Option(help="Plan file (repeatable).")],
    text: Annotated[
        list[Path], typer.Option("--text", "-t", help="A UTF-8 file that no plan was made on (repeatable).")
    ],
    max_tokens: Annotated[int, typer.Option(min=64, help="Tokens of each document.")] = 2048,
    documents_per_text: Documents = 2,
    retrieval_depths: Annotated[int, typer.Option(min=1, help="Places in the context where facts are hidden.")] = 5,
    retrieval_length: Annotated[int | None, typer.Option(min=64, help="Tokens [default: max-tokens less 48].")] = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity, accuracy, KL and facts found, of every plan and of the uniform cache that holds as many bytes.

    Example: `kvcompress evaluate HuggingFaceTB/SmolLM2-135M --plan plan.json --text another_book.txt`
    """
    options.check([output], plan=plan, text=text)
    texts = read_texts(text)

    from rich.console import Console

    from kvcompress.core.artifacts import write_json
    from kvcompress.core.plan import RetentionPlan
    from kvcompress.evaluation.compare import compare
    from kvcompress.evaluation.contenders import plan_contenders, plan_files
    from kvcompress.evaluation.params import ComparePlansParams
    from kvcompress.models import distributed

    plans = [RetentionPlan.load(path) for path in plan]
    loaded, tokenizer, record = options.open()
    settings = ComparePlansParams(
        max_tokens=max_tokens,
        documents_per_text=documents_per_text,
        chunk_size=1024,
        retrieval_lengths=[retrieval_length or max(max_tokens - 48, 64)],
        retrieval_depths=retrieval_depths,
        plans=list(plan_files(plan)),
    )
    if not distributed.rank():
        for found, path in zip(plans, plan, strict=True):
            warn_of(found, path, record, max_tokens)
    contenders = plan_contenders(loaded.config, max_tokens, plan)
    result = compare(loaded, tokenizer, record.id, texts, contenders, settings)
    if not distributed.leave():  # every process has the whole result, one writes it
        return
    if output:
        write_json(output, result)
    if as_json:
        print_json(result)
    else:
        show_rows(result, Console())
