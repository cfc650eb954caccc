"""What the subcommands share: options that choose a model and texts, and loading both."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.core.artifacts import read_text
from kvcompress.core.errors import InputError
from kvcompress.models.params import ModelParams, source_of

if TYPE_CHECKING:  # slow imports; help and completion do without
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.core.plan import RetentionPlan
    from kvcompress.models.sources import ModelRecord

Model = Annotated[str, typer.Argument(help="A model folder (safetensors), or a name on the Hugging Face hub.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", "-t", help="A UTF-8 text file (repeatable) [default: help topics of Python]."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceMap = Annotated[str | None, typer.Option(help="auto spreads a model that does not fit one device.")]
TpPlan = Annotated[
    str | None,
    typer.Option(help="auto splits every layer among the processes that torchrun started (docs/scaling.md)."),
]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a model on the hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


def model_params(
    model: str,
    device: str,
    dtype: str,
    device_map: str | None,
    revision: str,
    trust: bool,
    tp_plan: str | None = None,
) -> ModelParams:
    """Settings of a model that the command line names. Raises `InputError` for a name that can be neither."""
    place = source_of(model, revision, "MODEL")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {dtype!r}, expected float32, bfloat16 or float16")
    if tp_plan not in (None, "auto"):
        raise InputError(f"--tp-plan is {tp_plan!r}, expected auto")
    rest = {"device": device, "dtype": dtype, "device_map": device_map, "tp_plan": tp_plan, "trust_remote_code": trust}
    return ModelParams.model_validate(place | rest)


def open_model(params: ModelParams) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelRecord]":
    """Model, tokenizer and record; a hub model is fetched. With a `tp_plan` this process joins the others first.

    Raises `InputError` where torchrun started several processes and there is none: each would do, and write, all of it.
    """
    from kvcompress.models import distributed
    from kvcompress.models.load import load_folder
    from kvcompress.models.sources import locate_model

    if params.tp_plan:
        distributed.join()
    elif distributed.started():
        raise InputError(
            "torchrun started several processes, of which each would do all of this: start one, or run the stages, which"
            " share documents; commands that have --tp-plan split a model among them"
        )
    record, folder = locate_model(params)
    model, tokenizer = load_folder(folder, params)
    model.config.name_or_path = record.id
    return model, tokenizer, record


def read_texts(paths: Sequence[Path] | None) -> dict[str, str]:
    """Name -> text of the files, or the help topics of Python's standard library."""
    from kvcompress.texts.corpora import stdlib_topics

    if not paths:
        return {"pydoc": stdlib_topics("pydoc_data.topics")}
    texts = {path.stem: read_text(path) for path in paths}
    if len(texts) < len(paths):
        raise InputError(f"--text names {len(paths)} files, but two of them have the same name")
    return texts


def warn_of(plan: "RetentionPlan", name: str | Path, record: "ModelRecord", tokens: int) -> None:
    """Say on standard error what a plan was not made for: this model, or a text of so many tokens."""
    made_for = plan.budget.get("context_length")
    if "/" in plan.model_id and "/" in record.id and plan.model_id != record.id:  # a folder's name says little
        sys.stderr.write(f"warning: {name} was made for {plan.model_id}, not for {record.id}\n")
    if made_for and tokens > made_for:
        now, then = (share_of(plan, length) for length in (tokens, int(made_for)))
        sys.stderr.write(
            f"warning: {name} was made for {made_for:g} tokens, here are {tokens}: it keeps {now:.1%} of them,"
            f" against {then:.1%}, and less is found again; make one with --context {tokens} and a budget in percent\n"
        )


def share_of(plan: "RetentionPlan", tokens: int) -> float:
    """What a plan holds of `tokens` tokens as a share of the full cache, queries to choose by counted."""
    from kvcompress.scores.selection_rule import kept_query_slots  # which loads torch

    held = plan.held(tokens)
    return plan.share(tokens) * (held + kept_query_slots(plan)) / held


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
