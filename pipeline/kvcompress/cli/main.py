"""The `kvcompress` command, one subcommand a module. A user error ends it with one sentence and exit code 1."""

import os

import typer

from kvcompress import __version__
from kvcompress.cli.analyze import analyze
from kvcompress.cli.benchmark import benchmark
from kvcompress.cli.evaluate import evaluate
from kvcompress.cli.generate import generate
from kvcompress.cli.options import with_model
from kvcompress.cli.plan import plan
from kvcompress.cli.show import show
from kvcompress.core.errors import said_in_a_sentence

app = typer.Typer(
    help="Measure what every attention head does, and keep only the KV cache it needs.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in (analyze, plan, generate, evaluate):
    app.command()(with_model(command))
app.command()(with_model(benchmark, tensor_parallel=False))
app.command()(show)


def print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def main(version: bool = typer.Option(False, "--version", callback=print_version, is_eager=True)) -> None:
    """Measure what every attention head does, and keep only the KV cache it needs."""


def run() -> None:
    """Entry point. Exit codes: 0 done, 1 an error that a sentence explains, 2 a wrong command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported; see stages/__init__.py
    with said_in_a_sentence():
        app()
