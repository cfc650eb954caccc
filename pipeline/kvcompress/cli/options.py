"""Options that the subcommands share, and what they open: model and texts."""

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.core.artifacts import read_text
from kvcompress.core.errors import InputError
from kvcompress.models.params import ModelParams, source_of

if TYPE_CHECKING:  # slow imports, which help and completion do without
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcompress.core.outputs import Paths
    from kvcompress.core.plan import RetentionPlan
    from kvcompress.models.sources import ModelRecord

Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", "-t", help="A UTF-8 text file (repeatable) [default: help topics of Python]."),
]
Documents = Annotated[int, typer.Option(min=1, help="Documents taken from each text.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the whole result as JSON.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


@dataclass(frozen=True)
class ModelOptions:
    """The model that a command line names, and how it is loaded."""

    model: Annotated[str, typer.Argument(help="A model folder (safetensors), or a name on the Hugging Face hub.")]
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto"
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32"
    device_map: Annotated[str | None, typer.Option(help="auto spreads a model that does not fit one device.")] = None
    tp_plan: Annotated[
        str | None,
        typer.Option(help="auto splits every layer among the processes that torchrun started (docs/scaling.md)."),
    ] = None
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")] = "main"
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a model on the hub.")
    ] = False

    @property
    def params(self) -> ModelParams:
        """Settings as in section `model`. Raises `InputError` for a value that is not possible."""
        place = source_of(self.model, self.revision, "MODEL")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"--dtype is {self.dtype!r}, expected float32, bfloat16 or float16")
        if self.tp_plan not in (None, "auto"):
            raise InputError(f"--tp-plan is {self.tp_plan!r}, expected auto")
        names = ("device", "dtype", "device_map", "tp_plan", "trust_remote_code")
        return ModelParams.model_validate(place | {name: getattr(self, name) for name in names})

    def check(self, outputs: Iterable[Path | None] = (), **inputs: "Paths") -> None:
        """Raise `InputError` for an impossible value or output, before anything slow begins.

        Outputs must be writable and must not touch the model or `inputs`, paths by their flags with underscores for
        dashes.
        """
        from kvcompress.core.outputs import require_outputs

        self.params  # noqa: B018 (builds the section, which validates it)
        named: dict[str, Paths] = {"MODEL": self.model if Path(self.model).is_dir() else None}
        require_outputs(named | {f"--{flag.replace('_', '-')}": paths for flag, paths in inputs.items()}, outputs)

    def open(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelRecord]":
        """Return model, tokenizer and record. A hub model is fetched; with a `tp_plan`, processes are joined first.

        Raises `InputError` if torchrun started several processes and there is no `tp_plan`: each would do all the work.
        """
        from kvcompress.models import distributed
        from kvcompress.models.load import load_folder
        from kvcompress.models.sources import locate_model

        params = self.params
        if params.tp_plan:
            distributed.join()
        elif distributed.started():
            raise InputError(
                "this command runs in one process, but torchrun started several: start it without torchrun, or split the"
                " model with --tp-plan auto where the command has it"
            )
        record, folder = locate_model(params)
        model, tokenizer = load_folder(folder, params)
        model.config.name_or_path = record.id
        return model, tokenizer, record


def with_model(command: Callable[..., None], tensor_parallel: bool = True) -> Callable[..., None]:
    """Return a command whose parameter `options`, a `ModelOptions`, is filled by options of the command line.

    MODEL becomes the first argument, the others come before --json. Without `tensor_parallel` there is no --tp-plan.
    """
    model, *shared = inspect.signature(ModelOptions).parameters.values()
    shared = [one for one in shared if tensor_parallel or one.name != "tp_plan"]
    _, *own, as_json = inspect.signature(command).parameters.values()
    every = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (model, *own, *shared, as_json)]
    names = {field.name for field in fields(ModelOptions)}

    @wraps(command)
    def run(**given: Any) -> None:
        options = ModelOptions(**{name: value for name, value in given.items() if name in names})
        command(options, **{name: value for name, value in given.items() if name not in names})

    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in every}
    return run


def read_texts(paths: Sequence[Path] | None) -> dict[str, str]:
    """Return name -> text of the files, or the help topics of Python's standard library."""
    from kvcompress.texts.corpora import stdlib_topics

    if not paths:
        return {"pydoc": stdlib_topics("pydoc_data.topics")}
    texts = {path.stem: read_text(path) for path in paths}
    if len(texts) < len(paths):
        raise InputError(f"--text names {len(paths)} files, but two of them have the same name")
    return texts


def warn_of(plan: "RetentionPlan", name: str | Path, record: "ModelRecord", tokens: int) -> None:
    """Warn on standard error if a plan was made for another model, or for a shorter text than `tokens` tokens."""
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
    """Return what a plan holds of `tokens` tokens as a share of the full cache, kept queries included."""
    from kvcompress.scores.selection_rule import kept_query_slots  # which loads torch

    held = plan.held(tokens)
    return plan.share(tokens) * (held + kept_query_slots(plan)) / held


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
