"""Section `sensitivity`: on what and for which windows heads are priced."""

from typing import Annotated

from pydantic import Field, field_validator

from kvcompress.params.base import Count, SectionParams

Windows = Annotated[list[Count], Field(min_length=1)]


class SensitivityParams(SectionParams):
    """Heads are priced on `documents_per_text` documents of `max_tokens` of every calibration text, for `windows`.

    What a layer's heads cost together is measured for `joint_windows` on one document of each text. Facts: `fact_contexts`
    contexts, prose and monotony in turns, with `facts_per_context` facts each; a key farther than `far` tokens counts as
    far; `nodes` points of integration. Windows that do not fit a document are left out.
    """

    section = "sensitivity"

    max_tokens: Annotated[int, Field(ge=64)] = 2048
    documents_per_text: Count = 2
    windows: Windows = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536]
    joint_windows: Windows = [32, 128, 512]
    sinks: Annotated[int, Field(ge=0, le=64)] = 4
    fact_contexts: Count = 6
    facts_per_context: Annotated[int, Field(ge=1, le=64)] = 8
    far: Count = 128
    nodes: Annotated[int, Field(ge=1, le=16)] = 3
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("windows", "joint_windows")
    @classmethod
    def ascending(cls, windows: list[int]) -> list[int]:
        if sorted(set(windows)) != windows:
            raise ValueError("windows must ascend, each once")
        return windows
