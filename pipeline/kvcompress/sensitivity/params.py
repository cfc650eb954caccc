"""Section `sensitivity`: on what and for which windows heads are priced."""

from typing import Annotated

from pydantic import Field, field_validator

from kvcompress.core.params import Count, Name, SectionParams
from kvcompress.scores.registry import SCORES

Windows = Annotated[list[Count], Field(min_length=1)]


class SensitivityParams(SectionParams):
    """Heads are priced on `documents_per_text` documents of `max_tokens` of every calibration text, for `windows`.

    What a layer's heads cost together is measured for `joint_windows` on the first `joint_documents` of each text. Facts:
    `fact_contexts` contexts of `fact_tokens` (at most a document's), prose and monotony in turns, with
    `facts_per_context` facts each; a key farther than `far` tokens counts as far; `nodes` points of integration. Windows
    that do not fit a document are left out.

    Heads may also hold keys that a score chooses: `choice_sizes` slots besides sinks, of which each of `choice_parts` is
    chosen by each of `choice_scores` (names of `kvcompress.scores`). Divisions with a window below 64 are left out.
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
