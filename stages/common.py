"""What all stage scripts share: a Typer app that takes `--max-tokens` and `--max_tokens`, errors as one sentence, options."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvcompress.errors import InputError, KVCompressError
from kvcompress.params.base import load_section, override
from kvcompress.params.model import ModelParams

ParamsFile = Annotated[Path, typer.Option("--params", help="Parameters; flags override them.")]
DataDir = Annotated[Path, typer.Option(help="Folder of the pipeline's artifacts.")]
ReportsDir = Annotated[Path, typer.Option(help="Folder of reports, metrics and plot data.")]
ModelId = Annotated[str | None, typer.Option(help="Model on the hub, or a local folder, instead of params.yaml's.")]
Bf16 = Annotated[
    bool | None, typer.Option("--bf16/--no-bf16", help="bfloat16 or float32 instead of params.yaml's dtype.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]


def stage_app() -> typer.Typer:
    """An app whose flags may be written with dashes or underscores."""
    settings = {"token_normalize_func": lambda token: token.replace("_", "-"), "help_option_names": ["-h", "--help"]}
    return typer.Typer(add_completion=False, context_settings=settings, pretty_exceptions_enable=False)


def run(app: typer.Typer) -> None:
    """Run the app; an error that a user can mend is printed as one sentence and ends the program with code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except KVCompressError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    except OSError as error:  # a full disk or a lost folder, wherever it shows
        sys.stderr.write(f"error: {error.filename or 'a file'}: {error.strerror or error}\n")
        raise SystemExit(1) from None


def model_params(params: Path, model_id: str | None, bf16: bool | None, device: str | None) -> ModelParams:
    """The section `model` of `params` with the flags that choose another model, precision or device."""
    dtype = None if bf16 is None else "bfloat16" if bf16 else "float32"
    section = load_section(ModelParams, params, dtype=dtype, device=device)
    if model_id is None:
        return section
    if Path(model_id).is_dir():
        return override(section, source="local", local={"path": model_id})
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1 or not model_id.strip():
        raise InputError(f"--model-id is {model_id!r}, but there is no such folder, and it is no name on the hub")
    return override(section, source="hub", hub={"id": model_id, "revision": "main"})
