"""Section `sensitivity`: texts, windows and select options that heads are priced on."""

from typing import Annotated

from pydantic import Field, field_validator

from kvcompress.core.params import Count, Name, SectionParams
from kvcompress.scores.registry import SCORES

Windows = Annotated[list[Count], Field(min_length=1)]


class SensitivityParams(SectionParams):
    """Settings of the price measurement.

    Text: `documents_per_text` documents of `max_tokens` tokens of every calibration text, priced for `windows`. The
    joint price of a layer's heads is measured for `joint_windows` on the first `joint_documents` of each text. Windows
    that do not fit a document are left out.

    Select options: `choice_sizes` slots besides sinks, of which each of `choice_parts` holds keys selected by each of
    `choice_scores` (names of `kvcompress.scores`). Options with a window below 64 are left out.

    Facts: `fact_contexts` contexts of `fact_tokens` tokens (at most a document's), prose and repetitive text in turn,
    with `facts_per_context` facts each. Keys farther than `far` tokens count as far. `nodes`: points of the
    integration.
    """

    section = "sensitivity"

    max_tokens: Annotated[int, Field(ge=64)] = 2048
    documents_per_text: Count = 1
    windows: Windows = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536]
    joint_windows: Windows = [32, 128]
    joint_documents: Count = 1
    sinks: Annotated[int, Field(ge=0, le=64)] = 4
    choice_scores: list[Name] = ["expected_attention", "key_diff", "leverage"]
    choice_parts: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = [0.5]
    choice_sizes: Windows = [128, 256, 512, 1024]
    fact_contexts: Count = 12
    fact_tokens: Annotated[int, Field(ge=64)] = 2048
    facts_per_context: Annotated[int, Field(ge=1, le=64)] = 2
    far: Count = 256
    nodes: Annotated[int, Field(ge=1, le=16)] = 3
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("windows", "joint_windows", "choice_sizes")
    @classmethod
    def ascending(cls, windows: list[int]) -> list[int]:
        if sorted(set(windows)) != windows:
            raise ValueError("windows must ascend, each once")
        return windows

    @field_validator("choice_scores")
    @classmethod
    def known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in SCORES:
                raise ValueError(f"unknown score {name!r}, expected one of {', '.join(SCORES)}")
        return names
