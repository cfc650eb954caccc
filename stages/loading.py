"""What the stages share that run a model: which one, at what precision, on what device."""

from pathlib import Path

from kvcompress.core.artifacts import read_model
from kvcompress.core.errors import InputError
from kvcompress.core.params import SectionParams, load_section, override
from kvcompress.models.params import ModelParams, source_of
from kvcompress.models.sources import ModelRecord, locate_model


def chosen_model(
    data_dir: Path, model_id: str | None, loading: ModelParams, section: SectionParams, tokens: int
) -> ModelRecord:
    """The pipeline's model, or the one that `--model-id` names; `tokens` of a document must fit its context."""
    record = read_model(data_dir / "model.json", ModelRecord) if model_id is None else locate_model(loading)[0]
    if tokens > record.max_context:
        raise InputError(
            f"{section.section}.max_tokens is {tokens}, but the context of {record.id} ends at {record.max_context}"
        )
    return record


def model_params(params: Path, model_id: str | None, bf16: bool | None, device: str | None) -> ModelParams:
    """The section `model` of `params` with the flags that choose another model, precision or device."""
    dtype = None if bf16 is None else "bfloat16" if bf16 else "float32"
    section = load_section(ModelParams, params, dtype=dtype, device=device)
    return section if model_id is None else override(section, **source_of(model_id, "main", "--model-id"))
