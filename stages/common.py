"""What all stage scripts share: a Typer app that takes `--max-tokens` and `--max_tokens`, errors as one sentence, options."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kvcompress.core.errors import InputError, said_in_a_sentence

ParamsFile = Annotated[Path, typer.Option("--params", help="Parameters; flags override them.")]
DataDir = Annotated[Path, typer.Option(help="Folder of the pipeline's artifacts.")]
ReportsDir = Annotated[Path, typer.Option(help="Folder of reports, metrics and plot data.")]
ModelId = Annotated[str | None, typer.Option(help="Model on the hub, or a local folder, instead of params.yaml's.")]
Bf16 = Annotated[
    bool | None, typer.Option("--bf16/--no-bf16", help="bfloat16 or float32 instead of params.yaml's dtype.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens of each document.")]
ResultFile = Annotated[Path | None, typer.Option("--output", help="Write only the result, to this JSON file.")]
MetricsFile = Annotated[Path | None, typer.Option("--metrics", help="The few numbers that dvc metrics shows.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]


def stage_app() -> typer.Typer:
    """An app whose flags may be written with dashes or underscores."""
    settings = {"token_normalize_func": lambda token: token.replace("_", "-"), "help_option_names": ["-h", "--help"]}
    return typer.Typer(add_completion=False, context_settings=settings, pretty_exceptions_enable=False)


def run(app: typer.Typer, shares: bool = False) -> None:
    """Run the app; an error that a user can mend is printed as one sentence and ends the program with code 1.

    `shares`: the stage knows how to share its work with other processes (`stages.model_run`).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with said_in_a_sentence():
        if not shares and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(f"this stage works alone, but {os.environ['WORLD_SIZE']} processes were started for it")
        app()
